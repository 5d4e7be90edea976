// An HTTP server on a unix socket and its clients, in one process.
package main

import (
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
)

func main() {
	listener, err := net.Listen("unix", "s")
	if err != nil {
		panic(err)
	}
	http.HandleFunc("/", func(answer http.ResponseWriter, ask *http.Request) {
		body, _ := io.ReadAll(ask.Body)
		sum := sha256.Sum256(body)
		for i := 0; i < 500; i++ {
			sum = sha256.Sum256(sum[:])
		}
		fmt.Fprintf(answer, "%x", sum)
	})
	server := &http.Server{}
	go server.Serve(listener)
	dial := func(context.Context, string, string) (net.Conn, error) { return net.Dial("unix", "s") }
	client := &http.Client{Transport: &http.Transport{DialContext: dial, MaxIdleConnsPerHost: 4}}
	var clients sync.WaitGroup
	results := make([]string, 8)
	for n := range results {
		clients.Add(1)
		go func(n int) {
			defer clients.Done()
			for i := 0; i < 800; i++ {
				answer, err := client.Post("http://a/", "text/plain", strings.NewReader(results[n]+fmt.Sprint(n, i)))
				if err != nil {
					panic(err)
				}
				body, _ := io.ReadAll(answer.Body)
				answer.Body.Close()
				results[n] = string(body)
			}
		}(n)
	}
	clients.Wait()
	server.Shutdown(context.Background())
	fmt.Println(strings.Join(results, "\n"))
}
