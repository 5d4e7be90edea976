import java.util.stream.IntStream;
import java.util.stream.LongStream;

/** Sorts in parallel and makes garbage. */
public class Sort {
    public static void main(String[] args) {
        long sum = 0;
        for (int round = 0; round < 12; round++) {
            int seed = round;
            int[] sorted = IntStream.range(0, 300_000).parallel()
                    .map(i -> Integer.reverse(i * 7919 + seed)).boxed().sorted().mapToInt(i -> i).toArray();
            sum = sum * 31 + LongStream.range(0, sorted.length).map(i -> i * sorted[(int) i]).sum();
        }
        System.out.println(sum);
    }
}
