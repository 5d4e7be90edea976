# A hash of hashes that grows and is sorted.
use strict;
use warnings;

my ($dir) = @ARGV;
my (%count, $x, $sum);
($x, $sum) = (1, 0);
for my $round (1 .. 30) {
    while ($round == 25 && !-e "$dir/finish") { select(undef, undef, undef, 0.002) }
    for (1 .. 100_000) {
        $x = ($x * 16807) % 2147483647;
        $count{$x % 1000}{$x % 7}++;
    }
    for my $key (sort { $a <=> $b } keys %count) {
        $sum = ($sum * 31 + $key * ($count{$key}{3} // 1)) % 1000000007;
    }
    open(my $out, '>', "$dir/progress") or die;
    print $out "$round\n";
    close $out;
}
open(my $out, '>', "$dir/result") or die;
print $out "$x $sum\n";
