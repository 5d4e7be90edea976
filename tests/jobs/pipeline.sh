# Pipelines, loops and background jobs, several processes at a time.
dir=$1 total=0
numbers() {
	local x=$1 i
	for ((i = 0; i < 2500; i++)); do
		((x = x * 16807 % 2147483647))
		echo $x
	done
}
for ((round = 1; round <= 30; round++)); do
	while ((round == 25)) && [[ ! -e $dir/finish ]]; do sleep 0.01; done
	numbers $round | while read -r number; do echo $((number % 100)); done | sort -n | uniq -c |
		sort -rn >"$dir/counted" &
	(
		numbers $((round + 100)) | tac | tr 0-9 a-j >"$dir/letters"
		exit $((round % 7))
	) &
	letters=$!
	slow=$(for ((i = 0; i < 400; i++)); do echo $((i * round)); done | sort | tail -n 1)
	wait $letters
	code=$?
	wait
	total=$(cat "$dir/counted" "$dir/letters" <(echo "$total $code $slow") | sha256sum)
	echo $round >"$dir/progress"
done
[[ -z $(jobs) ]] && echo "$total" >"$dir/result"
