// An HTTP server in one process and 12 keep-alive connections in another: DIR.
const { createHash } = require("crypto");
const { fork } = require("child_process");
const fs = require("fs");
const http = require("http");

const digest = (text) => createHash("sha256").update(text).digest("hex");

function serve() {
  let sockets = 0;
  const server = http.createServer((request, response) => {
    let body = "";
    request.on("data", (piece) => (body += piece));
    request.on("end", () => response.end(`${request.url} ${digest(body)} ${body}`));
  });
  server.keepAliveTimeout = 0;
  server.on("connection", () => sockets++);
  server.listen(0, "127.0.0.1", () => process.send(server.address().port));
  process.on("message", () => {
    process.send({ sockets });
    server.close();
    process.disconnect();
  });
}

function ask(agent, port, path, body) {
  return new Promise((resolve, reject) => {
    const options = { agent, port, path, host: "127.0.0.1", method: "POST" };
    const request = http.request(options, (response) => {
      let text = "";
      response.on("data", (piece) => (text += piece));
      response.on("end", () => resolve(text));
      response.on("error", reject);
    });
    request.on("error", reject);
    request.end(body);
  });
}

async function main(dir) {
  const server = fork(__filename, ["--serve"]);
  const port = await new Promise((resolve) => server.once("message", resolve));
  const agent = new http.Agent({ keepAlive: true, maxSockets: 12 });
  let rounds = 0;
  async function client(name) {
    for (let number = 0; !fs.existsSync(`${dir}/finish`); number++) {
      const body = `${name} ${number} `.repeat(1 + ((name * number) % 5000));
      const text = await ask(agent, port, `/${name}/${number}`, body);
      if (text !== `/${name}/${number} ${digest(body)} ${body}`) throw new Error(text.slice(0, 200));
      if (name === 0 && number % 10 === 9) fs.writeFileSync(`${dir}/progress`, `${++rounds}\n`);
    }
  }
  await Promise.all(Array.from({ length: 12 }, (_, name) => client(name)));
  agent.destroy();
  const told = new Promise((resolve) => server.once("message", resolve));
  const ended = new Promise((resolve) => server.once("exit", resolve));
  server.send("end");
  const { sockets } = await told;
  // A connection that was lost would have been made anew.
  if (sockets !== 12) throw new Error(`${sockets} connections`);
  if ((await ended) !== 0) throw new Error("the server failed");
  fs.writeFileSync(`${dir}/result`, "right\n");
}

if (process.argv[2] === "--serve") serve();
else main(process.argv[2]);
