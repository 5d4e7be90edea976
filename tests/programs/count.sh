# Counts in a loop, with nothing but the shell itself.
dir=$1 x=1 sum=0
for ((round = 1; round <= 30; round++)); do
	while ((round == 25)) && [[ ! -e $dir/finish ]]; do :; done
	for ((i = 0; i < 4000; i++)); do
		((x = x * 16807 % 2147483647, sum = (sum * 31 + x) % 1000000007)) || true
		words[i % 50]=$x
	done
	echo $round >"$dir/progress"
done
echo "$x $sum ${words[*]}" >"$dir/result"
