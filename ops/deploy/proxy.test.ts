/** The relay behind nginx, configured as the README says. */
import { describe, expect, test } from "bun:test";
import { mkdtemp, rm } from "node:fs/promises";
import { get } from "node:http";
import { tmpdir } from "node:os";
import { join } from "node:path";
import type { Clock, RelayHandle } from "../../server.ts";
import { configFromEnv, systemClock } from "../../server.ts";
import { Client } from "../shared/client.ts";
import { testRelay } from "../shared/relay.ts";

const nginx = Bun.which("nginx", { PATH: `${process.env.PATH}:/usr/sbin` });
const whyNot = nginx === null ? " (skipped: no nginx on this machine)" : "";
const site = await Bun.file(new URL("nginx.conf", import.meta.url)).text();

/** Replaces what stands exactly once in the configuration. @throws where it doesn't */
function replaceOne(text: string, what: string, by: string): string {
  if (text.split(what).length !== 2) throw new Error(`${what} doesn't stand once in nginx.conf`);
  return text.replace(what, by);
}

/** Starts an nginx of the test's own in front of a relay. @param readTimeout instead of the 60 s of nginx.conf */
async function startNginx(relay: RelayHandle, readTimeout = "60s") {
  await using stack = new AsyncDisposableStack();
  const directory = await mkdtemp(join(tmpdir(), "party-sockets-nginx-"));
  stack.defer(() => rm(directory, { recursive: true, force: true }));
  const probe = Bun.serve({ port: 0, hostname: "127.0.0.1", fetch: () => new Response() });
  const address = `127.0.0.1:${probe.port}`; // nginx takes no port 0, so a free one is found first
  await probe.stop(true);
  let conf = replaceOne(site, "listen 80;", `listen ${address};`);
  conf = replaceOne(conf, "server 127.0.0.1:3000;", `server 127.0.0.1:${relay.port};`);
  conf = replaceOne(conf, "proxy_read_timeout 60s;", `proxy_read_timeout ${readTimeout};`);
  await Bun.write(join(directory, "site.conf"), conf);
  const temporary = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"].map((name) => `${name}_temp_path ${directory}/${name};`);
  await Bun.write(
    join(directory, "nginx.conf"),
    `daemon off; pid ${directory}/pid; error_log stderr notice; events {}
     http { access_log off; ${temporary.join(" ")} include ${directory}/site.conf; }`,
  );
  const server = Bun.spawn([nginx as string, "-e", "stderr", "-c", join(directory, "nginx.conf")], { stderr: "pipe" });
  stack.defer(async () => {
    server.kill();
    await server.exited;
  });
  let log = "";
  for await (const text of server.stderr.pipeThrough(new TextDecoderStream())) {
    log += text;
    if (log.includes("start worker process ")) break;
  }
  if (server.exitCode !== null) throw new Error(log);
  const running = stack.move();
  return { url: `http://${address}`, [Symbol.asyncDispose]: () => running.disposeAsync() };
}

/** The status of a GET. @param from the address of this machine that it comes from, which `fetch` can't choose */
const statusFrom = (url: string, from: string, headers: Record<string, string> = {}): Promise<number> =>
  new Promise((resolve, reject) =>
    get(url, { localAddress: from, headers }, (answer) => {
      answer.resume();
      resolve(answer.statusCode ?? 0);
    }).on("error", reject),
  );

describe.skipIf(nginx === null)(`behind nginx${whyNot}`, () => {
  test("host and guest talk through WebSockets", async () => {
    await using relay = testRelay();
    await using proxy = await startNginx(relay);
    const host = await Client.open(proxy.url, { Origin: "https://game.example" });
    const guest = await Client.open(`${proxy.url}/any/path`);
    const room = await host.create();
    expect(await guest.join(room, "guest")).toMatchObject({ type: "joined", peers: [0] });
    await host.next(); // peer_joined
    const drawing = "é".repeat(100_000);
    host.send({ type: "send", data: drawing });
    expect(await guest.next()).toEqual({ type: "message", from: 0, data: drawing });
    const answer = await fetch(`${proxy.url}/room/${room}`);
    expect(await answer.json()).toEqual({ clients: 2, maxClients: 8, origin: "https://game.example" });
    host.send({ type: "close_room" });
    expect(await guest.closed).toEqual({ code: 4001, reason: "room closed" });
  });

  test("wrong codes count for the client's own address, whatever header it sends", async () => {
    const { addressHeader } = configFromEnv({ ADDRESS_HEADER: "X-Forwarded-For" });
    await using relay = testRelay({ addressHeader, maxMissesPerMinute: 2 });
    await using proxy = await startNginx(relay);
    const miss = (from: string, headers?: Record<string, string>) => statusFrom(`${proxy.url}/room/zzzzzz`, from, headers);
    expect(await miss("127.0.0.1")).toBe(404);
    expect(await miss("127.0.0.1", { "X-Forwarded-For": "192.0.2.1" })).toBe(404);
    expect(await miss("127.0.0.1", { "X-Forwarded-For": "192.0.2.2" })).toBe(429);
    expect(await miss("127.0.0.2")).toBe(404);
  });

  test("metrics are for the machine itself", async () => {
    await using relay = testRelay();
    await using proxy = await startNginx(relay);
    expect(await statusFrom(`${proxy.url}/metrics`, "127.0.0.1")).toBe(200);
    expect(await statusFrom(`${proxy.url}/metrics`, "127.0.0.2")).toBe(403);
  });

  test("a silent socket outlives nginx's timeout, because the relay pings it", async () => {
    const SPEED = 30; // one of the two relays, and its nginx, live so much faster
    const fastClock: Clock = {
      now: () => systemClock.now() * SPEED,
      epoch: () => systemClock.epoch(),
      after: (ms, run) => systemClock.after(ms / SPEED, run),
      rest: () => {},
    };
    const timeout = `${60_000 / SPEED}ms`;
    await using relay = testRelay({ clock: fastClock });
    await using still = testRelay(); // its next ping is far behind the same timeout
    await using proxy = await startNginx(relay, timeout);
    await using stillProxy = await startNginx(still, timeout);
    const player = await Client.open(proxy.url);
    const cut = await Client.open(stillProxy.url);
    await player.create();
    await cut.create();
    expect((await cut.closed).code).toBe(1006);
    const sixSeconds = Promise.withResolvers<void>();
    fastClock.after(6_000, sixSeconds.resolve);
    await sixSeconds.promise; // and a little longer than the other one lived
    expect(await player.soFar()).toEqual([]);
  });
});
