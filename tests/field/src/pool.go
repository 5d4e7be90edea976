// Goroutines over channels and a collected heap.
package main

import (
	"crypto/sha256"
	"fmt"
	"sync"
)

func work(part int) [32]byte {
	sum := sha256.Sum256([]byte(fmt.Sprint(part)))
	heap := map[byte][]byte{}
	for i := 0; i < 4000; i++ {
		sum = sha256.Sum256(append(heap[sum[0]], sum[:]...))
		heap[sum[1]] = append([]byte{}, sum[:]...)
	}
	return sum
}

func main() {
	parts := make([][32]byte, 300)
	jobs := make(chan int)
	var wait sync.WaitGroup
	for worker := 0; worker < 8; worker++ {
		wait.Add(1)
		go func() {
			defer wait.Done()
			for part := range jobs {
				parts[part] = work(part)
			}
		}()
	}
	for part := range parts {
		jobs <- part
	}
	close(jobs)
	wait.Wait()
	fmt.Printf("%x\n", sha256.Sum256([]byte(fmt.Sprint(parts))))
}
