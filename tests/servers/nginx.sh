# nginx with two workers, a curl for each file and a keep-alive client: PYTHON PORT DIR.
set -eu
python=$1 port=$2 dir=$3 here=$(dirname "$0")
head -c 3000000 /dev/urandom >"$dir/page"
cat >"$dir/conf" <<END
daemon off; worker_processes 2; pid $dir/pid; error_log $dir/nginx.log; $([ "$(id -u)" = 0 ] && echo "user root root;")
events { }
http { access_log off; client_body_temp_path $dir/body; proxy_temp_path $dir/proxy; fastcgi_temp_path $dir/fast;
uwsgi_temp_path $dir/uwsgi; scgi_temp_path $dir/scgi; keepalive_requests 1000000; keepalive_timeout 1000;
server { listen 127.0.0.1:$port; root $dir; } }
END
nginx -e stderr -c "$dir/conf" &
server=$!
until curl -sSf "http://127.0.0.1:$port/pid" -o /dev/null 2>/dev/null; do sleep 0.05; done
"$python" "$here/keepalive.py" "$port" "$dir" &
client=$!
sum=$(sha1sum <"$dir/page")
rounds=0
while [ ! -e "$dir/finish" ]; do
	got=$(curl -sSf "http://127.0.0.1:$port/page" | sha1sum)
	if [ "$got" != "$sum" ]; then
		echo "curl got another file" >"$dir/result"
		exit 1
	fi
	rounds=$((rounds + 1))
	echo $rounds >"$dir/progress"
done
wait $client
kill -QUIT $server
wait $server
echo right >"$dir/result"
