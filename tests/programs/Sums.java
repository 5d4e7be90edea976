import java.io.File;
import java.io.FileWriter;
import java.io.IOException;
import java.util.HashMap;
import java.util.Map;
import java.util.concurrent.ExecutorService;
import java.util.concurrent.Executors;
import java.util.concurrent.Future;

/** Compiled code, a heap that is collected, and a pool of threads. */
class Sums {
    static void write(File file, String text) throws IOException {
        try (FileWriter out = new FileWriter(file)) {
            out.write(text + "\n");
        }
    }

    static long work(int round, int part) {
        Map<Long, long[]> map = new HashMap<>();
        long x = round * 31L + part + 1, sum = 0;
        for (int i = 0; i < 150_000; i++) {
            x = x * 6364136223846793005L + 1442695040888963407L;
            long[] cell = map.computeIfAbsent(x >>> 52, key -> new long[16]);
            cell[i & 15] += x;
            sum = sum * 31 + cell[(i * 7) & 15];
        }
        return sum;
    }

    public static void main(String[] args) throws Exception {
        String dir = args[0];
        ExecutorService pool = Executors.newFixedThreadPool(4);
        long total = 0;
        for (int round = 1; round <= 30; round++) {
            while (round == 25 && !new File(dir, "finish").exists()) Thread.sleep(2);
            Future<?>[] parts = new Future<?>[8];
            for (int part = 0; part < parts.length; part++) {
                int r = round, p = part;
                parts[part] = pool.submit(() -> work(r, p));
            }
            for (Future<?> part : parts) total = total * 31 + (Long) part.get();
            write(new File(dir, "progress"), "" + round);
        }
        pool.shutdown();
        write(new File(dir, "result"), Long.toHexString(total));
    }
}
