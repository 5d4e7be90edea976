// An HTTP server in one process and 12 keep-alive connections in another: DIR.
package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"sync"
	"time"
)

func must(err error) {
	if err != nil {
		panic(err)
	}
}

func serve() {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	must(err)
	handler := func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		must(err)
		fmt.Fprintf(w, "%s %x %s", r.URL.Path, sha256.Sum256(body), body)
	}
	server := http.Server{Handler: http.HandlerFunc(handler)}
	fmt.Println(listener.Addr())
	// Until the client closes our standard input.
	go func() {
		io.Copy(io.Discard, os.Stdin)
		server.Close()
	}()
	if err := server.Serve(listener); err != http.ErrServerClosed {
		panic(err)
	}
}

// A connection that only we may close. The transport does so when a request takes longer than it likes.
type lasting struct{ net.Conn }

func (c lasting) Read(buffer []byte) (int, error) {
	count, err := c.Conn.Read(buffer)
	if err != nil && !errors.Is(err, net.ErrClosed) {
		panic("a connection was lost: " + err.Error())
	}
	return count, err
}

func connect(_ context.Context, network, address string) (net.Conn, error) {
	conn, err := net.Dial(network, address)
	must(err)
	return lasting{conn}, nil
}

func ask(client *http.Client, url string, body []byte) []byte {
	response, err := client.Post(url, "text/plain", bytes.NewReader(body))
	must(err)
	text, err := io.ReadAll(response.Body)
	must(err)
	response.Body.Close()
	return text
}

func main() {
	if len(os.Args) == 3 {
		serve()
		return
	}
	dir := os.Args[1]
	server := exec.Command(os.Args[0], "serve", "it")
	server.Stderr = os.Stderr
	end, err := server.StdinPipe()
	must(err)
	said, err := server.StdoutPipe()
	must(err)
	must(server.Start())
	var address string
	_, err = fmt.Fscanln(said, &address)
	must(err)
	transport := &http.Transport{DialContext: connect, MaxConnsPerHost: 12, MaxIdleConnsPerHost: 12, IdleConnTimeout: time.Hour}
	client := &http.Client{Transport: transport}
	var all sync.WaitGroup
	for name := 0; name < 12; name++ {
		all.Add(1)
		go func(name int) {
			defer all.Done()
			for number := 0; ; number++ {
				if _, err := os.Stat(dir + "/finish"); err == nil {
					return
				}
				path := fmt.Sprintf("/%d/%d", name, number)
				body := bytes.Repeat([]byte(path), 1+name*number%3000)
				text := ask(client, "http://"+address+path, body)
				if wanted := fmt.Sprintf("%s %x %s", path, sha256.Sum256(body), body); wanted != string(text) {
					panic("wrong answer to " + path)
				}
				if name == 0 && number%50 == 49 {
					must(os.WriteFile(dir+"/progress", []byte(fmt.Sprintln((number+1)/50)), 0o644))
				}
			}
		}(name)
	}
	all.Wait()
	transport.CloseIdleConnections()
	must(end.Close())
	must(server.Wait())
	must(os.WriteFile(dir+"/result", []byte("right\n"), 0o644))
}
