# 30 rounds of strings, symbols, hashes, fibers and threads; see README.md.
dir = ARGV[0]
words = Hash.new(0)
numbers = Fiber.new { n = 1; loop { Fiber.yield n = n * 1103515245 + 12345 & 0xffffffff } }
queue = Queue.new
sums = [0]
taker = Thread.new { while (n = queue.pop) do sums[0] = (sums[0] * 31 + n) % 1000000007 end }
(1..30).each do |round|
  if round == 25
    sleep 0.005 until File.exist?("#{dir}/finish")
  end
  3000.times do
    n = numbers.resume
    words["w#{n % 997}"] += n % 10
    queue << n
  end
  sleep 0.03
  File.write("#{dir}/progress.new", round.to_s)
  File.rename("#{dir}/progress.new", "#{dir}/progress")
end
queue << nil
taker.join
File.write("#{dir}/result", "#{sums[0]} #{words.sort.flatten.join.sum}\n")
