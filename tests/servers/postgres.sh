# A postgres server and pgbench with 6 connections over TCP; at the end the books must balance: PORT DIR.
set -eu
dir=$2
export PGHOST=127.0.0.1 PGPORT=$1 PGUSER=tester PGDATABASE=postgres
initdb -D "$dir/data" -U tester -A trust --no-sync >/dev/null
postgres -D "$dir/data" -k "" -c listen_addresses=127.0.0.1 -c autovacuum_naptime=1 -c fsync=off &
server=$!
until psql -qtAc 'SELECT 1' >/dev/null 2>&1; do sleep 0.05; done
pgbench -i -q -s 1
rounds=0
while [ ! -e "$dir/finish" ]; do
	pgbench -n -c 6 -j 2 -t 30
	rounds=$((rounds + 1))
	echo $rounds >"$dir/progress"
done
psql -qtAc "SELECT CASE WHEN (SELECT sum(abalance) FROM pgbench_accounts) = (SELECT sum(delta) FROM pgbench_history)
	AND (SELECT sum(tbalance) FROM pgbench_tellers) = (SELECT sum(bbalance) FROM pgbench_branches)
	AND (SELECT sum(tbalance) FROM pgbench_tellers) = (SELECT sum(delta) FROM pgbench_history)
	AND (SELECT count(*) FROM pgbench_history) = $rounds * 180 THEN 'right' ELSE 'the books do not balance' END" >"$dir/result"
kill -INT $server
wait $server
