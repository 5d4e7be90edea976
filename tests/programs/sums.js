// Compiled code, a heap that is collected, timers and the thread pool (pbkdf2) at once.
const fs = require('fs');
const crypto = require('crypto');
const util = require('util');
const dir = process.argv[2];
const derive = util.promisify(crypto.pbkdf2);
const sleep = util.promisify(setTimeout);

function sieve(limit) {
  const composite = new Uint8Array(limit + 1);
  let sum = 0;
  for (let i = 2; i <= limit; i++) {
    if (composite[i]) continue;
    sum += i;
    for (let j = i * i; j <= limit; j += i) composite[j] = 1;
  }
  return sum;
}

async function main() {
  const total = crypto.createHash('sha256');
  let garbage = [];
  for (let round = 1; round <= 30; round++) {
    while (round === 25 && !fs.existsSync(`${dir}/finish`)) await sleep(2);
    const keys = [1, 2, 3, 4].map((n) => derive(`${round}`, `${n}`, 8000, 32, 'sha256'));
    garbage = Array.from({ length: 20000 }, (_, i) => ({ i, text: `${i * round}` }));
    total.update(`${sieve(300000 + round)} ${garbage[round].text}`);
    await sleep(3);
    for (const key of await Promise.all(keys)) total.update(key);
    fs.writeFileSync(`${dir}/progress`, `${round}\n`);
  }
  fs.writeFileSync(`${dir}/result`, `${total.digest('hex')}\n`);
}
main();
