# A problem of whole numbers for a solver.
set I := 1..35;
param w{i in I} := (i * 7919) mod 97 + 3;
param v{i in I} := (i * 104729) mod 89 + 5;
var x{I} binary;
var y{I} binary;
maximize total: sum{i in I} v[i] * (x[i] + y[i]);
s.t. weight: sum{i in I} w[i] * x[i] <= 333;
s.t. other: sum{i in I} v[i] * w[i] * y[i] <= 7777;
s.t. once{i in I}: x[i] + y[i] <= 1;
solve;
printf{i in I: x[i] > 0.5} "x[%d]\n", i;
printf "total %d\n", total;
end;
