import java.io.*;
import java.net.*;
import java.nio.ByteBuffer;
import java.nio.channels.*;
import java.nio.file.*;
import java.util.*;
import java.util.concurrent.*;

/** A server with a Selector in one virtual machine, 10 connections of threads in another: CLASSES DIR. */
public class Nio {
    public static void main(String[] args) throws Exception {
        if (args.length == 1) {
            serve();
            return;
        }
        Path dir = Path.of(args[1]);
        Process server = new ProcessBuilder("java", "-XX:+UseSerialGC", "-cp", args[0], "Nio", "serve")
            .redirectError(ProcessBuilder.Redirect.INHERIT).start();
        int port = Integer.parseInt(new BufferedReader(new InputStreamReader(server.getInputStream())).readLine());
        ExecutorService pool = Executors.newFixedThreadPool(10);
        List<Future<?>> clients = new ArrayList<>();
        for (int name = 0; name < 10; name++) {
            int mine = name;
            clients.add(pool.submit(() -> { talk(mine, port, dir); return null; }));
        }
        for (Future<?> client : clients) client.get();
        pool.shutdown();
        if (server.waitFor() != 0) throw new IllegalStateException("the server failed");
        Files.writeString(dir.resolve("result"), "right\n");
    }

    /** Numbers, each answered with its square, twenty on their way at a time. */
    static void talk(int name, int port, Path dir) throws Exception {
        try (Socket socket = new Socket("127.0.0.1", port)) {
            DataOutputStream out = new DataOutputStream(new BufferedOutputStream(socket.getOutputStream()));
            DataInputStream in = new DataInputStream(new BufferedInputStream(socket.getInputStream()));
            long number = name;
            for (int round = 1; !Files.exists(dir.resolve("finish")); round++) {
                for (int turn = 0; turn < 50; turn++) {
                    for (int ahead = 0; ahead < 20; ahead++) out.writeLong(number + ahead);
                    out.flush();
                    for (int ahead = 0; ahead < 20; ahead++, number++) {
                        long answer = in.readLong();
                        if (answer != number * number) throw new IllegalStateException(number + " squared is " + answer);
                    }
                }
                if (name == 0) {
                    Path fresh = dir.resolve("progress.new");
                    Files.writeString(fresh, round + "\n");
                    Files.move(fresh, dir.resolve("progress"), StandardCopyOption.ATOMIC_MOVE);
                }
            }
        }
    }

    static void serve() throws Exception {
        Selector selector = Selector.open();
        ServerSocketChannel listener = ServerSocketChannel.open().bind(new InetSocketAddress("127.0.0.1", 0));
        listener.configureBlocking(false).register(selector, SelectionKey.OP_ACCEPT);
        System.out.println(((InetSocketAddress) listener.getLocalAddress()).getPort());
        int open = 0;
        boolean more = true;
        while (more) {
            selector.select();
            for (SelectionKey key : selector.selectedKeys()) {
                if (key.isAcceptable()) {
                    SocketChannel channel = listener.accept();
                    channel.configureBlocking(false).register(selector, SelectionKey.OP_READ, ByteBuffer.allocate(4096));
                    open++;
                    continue;
                }
                SocketChannel channel = (SocketChannel) key.channel();
                ByteBuffer buffer = (ByteBuffer) key.attachment();
                if (channel.read(buffer) < 0) {
                    channel.close();
                    more = --open > 0;
                    continue;
                }
                buffer.flip();
                ByteBuffer answer = ByteBuffer.allocate(4096);
                while (buffer.remaining() >= 8) {
                    long number = buffer.getLong();
                    answer.putLong(number * number);
                }
                buffer.compact();
                answer.flip();
                while (answer.hasRemaining()) channel.write(answer);
            }
            selector.selectedKeys().clear();
        }
    }
}
