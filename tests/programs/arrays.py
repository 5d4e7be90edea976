"""numpy: matrices, a random generator's state, vectorised functions."""
import hashlib
import os
import sys
import time

import numpy

DIR = sys.argv[1]
random = numpy.random.default_rng(7)
matrix = random.standard_normal((160, 160))
total = hashlib.sha256()
for number in range(30):
    while number == 24 and not os.path.exists(f"{DIR}/finish"):
        time.sleep(0.002)
    for _ in range(6):
        matrix = matrix @ random.standard_normal((160, 160))
        matrix = numpy.tanh(matrix / numpy.abs(matrix).max())
        order = numpy.sort(matrix, axis=None)
    total.update(order.tobytes())
    with open(f"{DIR}/progress", "w") as out:
        print(number + 1, file=out)
with open(f"{DIR}/result", "w") as out:
    print(total.hexdigest(), matrix.sum().hex(), file=out)
