# A postgres server in DIR/data and pgbench, both children of this shell; at the end the books must balance.
set -eu
dir=$1
export PGHOST=$dir PGUSER=tester PGDATABASE=postgres
initdb -D "$dir/data" -U tester -A trust --no-sync >/dev/null
postgres -D "$dir/data" -k "$dir" -c listen_addresses= -c autovacuum_naptime=1 &
server=$!
until psql -qtAc 'SELECT 1' >/dev/null 2>&1; do sleep 0.05; done
pgbench -i -q -s 1
echo ready >"$dir/ready"
while [ ! -e "$dir/finish" ]; do
	pgbench -n -c 3 -j 1 -t 100
	psql -qtAc 'SELECT count(*) FROM pgbench_history' >"$dir/count.new"
	mv "$dir/count.new" "$dir/count"
done
psql -qtAc "SELECT (SELECT sum(abalance) FROM pgbench_accounts) = (SELECT sum(delta) FROM pgbench_history),
	(SELECT sum(tbalance) FROM pgbench_tellers) = (SELECT sum(bbalance) FROM pgbench_branches),
	(SELECT sum(tbalance) FROM pgbench_tellers) = (SELECT sum(delta) FROM pgbench_history),
	(SELECT count(*) FROM pgbench_history) % 300" >"$dir/result"
kill -INT $server
wait $server
