import java.io.File;
import java.io.FileWriter;
import java.io.IOException;
import java.net.StandardProtocolFamily;
import java.net.UnixDomainSocketAddress;
import java.nio.ByteBuffer;
import java.nio.channels.FileChannel;
import java.nio.channels.SelectionKey;
import java.nio.channels.Selector;
import java.nio.channels.ServerSocketChannel;
import java.nio.channels.SocketChannel;
import java.nio.file.Path;
import java.nio.file.StandardOpenOption;

/** java.nio: a selector, channels over a unix socket, a file channel. The first channel makes the half-open pair that closes sockets. */
class Channels {
    static void write(File file, String text) throws IOException {
        try (FileWriter out = new FileWriter(file)) {
            out.write(text + "\n");
        }
    }

    /** Sends back each number multiplied. */
    static void serve(ServerSocketChannel server) throws IOException {
        Selector selector = Selector.open();
        server.configureBlocking(false);
        server.register(selector, SelectionKey.OP_ACCEPT);
        ByteBuffer buffer = ByteBuffer.allocateDirect(8);
        while (true) {
            selector.select();
            for (SelectionKey key : selector.selectedKeys()) {
                if (key.isAcceptable()) {
                    SocketChannel client = server.accept();
                    client.configureBlocking(false);
                    client.register(selector, SelectionKey.OP_READ);
                    continue;
                }
                SocketChannel client = (SocketChannel) key.channel();
                buffer.clear();
                while (buffer.hasRemaining()) if (client.read(buffer) < 0) return;
                buffer.flip();
                long x = buffer.getLong() * 6364136223846793005L + 1442695040888963407L;
                buffer.clear();
                buffer.putLong(x).flip();
                while (buffer.hasRemaining()) client.write(buffer);
            }
            selector.selectedKeys().clear();
        }
    }

    public static void main(String[] args) throws Exception {
        String dir = args[0];
        // A short name, since addresses are; relative, since the directory may be long.
        UnixDomainSocketAddress address = UnixDomainSocketAddress.of(args[0].length() < 90 ? dir + "/socket" : "socket");
        ServerSocketChannel server = ServerSocketChannel.open(StandardProtocolFamily.UNIX).bind(address);
        Thread thread = new Thread(() -> {
            try {
                serve(server);
            } catch (IOException e) {
                e.printStackTrace();
                System.exit(1);
            }
        });
        thread.setDaemon(true);
        thread.start();
        SocketChannel client = SocketChannel.open(address);
        FileChannel file = FileChannel.open(Path.of(dir, "data"), StandardOpenOption.CREATE, StandardOpenOption.READ, StandardOpenOption.WRITE);
        ByteBuffer buffer = ByteBuffer.allocateDirect(8);
        long total = 1;
        for (int round = 1; round <= 30; round++) {
            while (round == 25 && !new File(dir, "finish").exists()) Thread.sleep(2);
            for (int i = 0; i < 1000; i++) {
                buffer.clear();
                buffer.putLong(total).flip();
                while (buffer.hasRemaining()) client.write(buffer);
                buffer.clear();
                while (buffer.hasRemaining()) client.read(buffer);
                buffer.flip();
                total ^= buffer.getLong();
                buffer.flip();
                file.write(buffer);
            }
            Thread.sleep(20);
            write(new File(dir, "progress"), "" + round);
        }
        write(new File(dir, "result"), Long.toHexString(total) + " " + file.size());
    }
}
