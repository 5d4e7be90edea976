# redis-server and redis-benchmark with 50 connections, which increments one counter: PORT DIR.
set -eu
port=$1 dir=$2
cli() { redis-cli -h 127.0.0.1 -p "$port" "$@"; }
redis-server --bind 127.0.0.1 --port "$port" --save "" --dir "$dir" >"$dir/server.log" 2>&1 &
server=$!
until [ "$(cli ping 2>/dev/null)" = PONG ]; do sleep 0.05; done
rounds=0
while [ ! -e "$dir/finish" ]; do
	redis-benchmark -h 127.0.0.1 -p "$port" -n 10000 -c 50 -P 2 -t incr -q >"$dir/said"
	rounds=$((rounds + 1))
	echo $rounds >"$dir/progress"
done
count=$(cli get counter:__rand_int__)
[ "$count" = $((rounds * 10000)) ] && echo right >"$dir/result" || echo "$count of $rounds rounds" >"$dir/result"
cli shutdown nosave
wait $server
