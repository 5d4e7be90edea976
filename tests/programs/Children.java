import java.io.BufferedReader;
import java.io.BufferedWriter;
import java.io.File;
import java.io.FileWriter;
import java.io.IOException;
import java.util.concurrent.CompletableFuture;

/** Child processes: two that live as long as the program and are talked to, a pipeline and one to be waited for in each round. */
class Children {
    static void write(File file, String text) throws IOException {
        try (FileWriter out = new FileWriter(file)) {
            out.write(text + "\n");
        }
    }

    /** A child that adds up the numbers that it is given and answers with the sum so far. */
    static class Adder {
        final Process process;
        final BufferedWriter to;
        final BufferedReader from;

        Adder(String... command) throws IOException {
            process = new ProcessBuilder(command).redirectError(ProcessBuilder.Redirect.INHERIT).start();
            to = process.outputWriter();
            from = process.inputReader();
        }

        long add(long number) throws IOException {
            to.write(number + "\n");
            to.flush();
            String line = from.readLine();
            if (line == null) throw new IOException("child " + process.pid() + " has ended");
            return Long.parseLong(line);
        }

        void end() throws Exception {
            to.close();
            if (process.waitFor() != 0) throw new IOException("a child ended with " + process.exitValue());
        }
    }

    public static void main(String[] args) throws Exception {
        String dir = args[0];
        Adder shell = new Adder("sh", "-c", "s=0; while read n; do s=$((s + n)); echo $s; done");
        Adder perl = new Adder("perl", "-ne", "BEGIN { $| = 1 } $s += $_; print \"$s\\n\"");
        long total = 0;
        for (int round = 1; round <= 30; round++) {
            while (round == 25 && !new File(dir, "finish").exists()) Thread.sleep(2);
            // Its end is told by the thread that waits for it.
            Process napping = new ProcessBuilder("sh", "-c", "sleep 0.03; exit " + round).start();
            CompletableFuture<Integer> status = napping.onExit().thenApply(Process::exitValue);
            for (int i = 0; i < 50; i++) total = total * 31 + shell.add(round * i) - perl.add(i);
            var pipeline = ProcessBuilder.startPipeline(java.util.List.of(
                new ProcessBuilder("seq", "1", "" + round * 100), new ProcessBuilder("tail", "-n", "1")));
            total = total * 31 + Long.parseLong(pipeline.get(1).inputReader().readLine());
            total = total * 31 + status.get();
            File progress = new File(dir, "progress.new");
            write(progress, "" + round);
            progress.renameTo(new File(dir, "progress"));
        }
        shell.end();
        perl.end();
        write(new File(dir, "result"), "" + total);
    }
}
