// Goroutines over channels, timers and a collected heap; linked statically, without libc.
package main

import (
	"crypto/sha256"
	"fmt"
	"os"
	"sync"
	"time"
)

func work(round, part int) [32]byte {
	sum := sha256.Sum256([]byte(fmt.Sprint(round, part)))
	heap := map[byte][]byte{}
	for i := 0; i < 4000; i++ {
		sum = sha256.Sum256(append(heap[sum[0]], sum[:]...))
		heap[sum[1]] = append([]byte{}, sum[:]...)
	}
	return sum
}

func main() {
	dir := os.Args[1]
	total := sha256.New()
	ticks := time.NewTicker(time.Millisecond)
	defer ticks.Stop()
	for round := 1; round <= 30; round++ {
		for round == 25 {
			if _, err := os.Stat(dir + "/finish"); err == nil {
				break
			}
			<-ticks.C
		}
		parts := make([][32]byte, 16)
		jobs := make(chan int)
		var wait sync.WaitGroup
		for worker := 0; worker < 8; worker++ {
			wait.Add(1)
			go func() {
				defer wait.Done()
				for part := range jobs {
					parts[part] = work(round, part)
				}
			}()
		}
		for part := range parts {
			jobs <- part
		}
		close(jobs)
		wait.Wait()
		for _, part := range parts {
			total.Write(part[:])
		}
		if err := os.WriteFile(dir+"/progress", []byte(fmt.Sprintln(round)), 0o644); err != nil {
			panic(err)
		}
	}
	if err := os.WriteFile(dir+"/result", []byte(fmt.Sprintf("%x\n", total.Sum(nil))), 0o644); err != nil {
		panic(err)
	}
}
