/** What players and strangers meet at a relay behind a proxy, whichever proxy it is. */
import { describe, expect, test } from "bun:test";
import { connect } from "node:net";
import type { Clock } from "../../server.ts";
import { configFromEnv, systemClock } from "../../server.ts";
import { Client } from "../shared/client.ts";
import { TestClock, testRelay } from "../shared/relay.ts";
import { within } from "../shared/wait.ts";
import type { Edits, Program } from "../shared/proxies.ts";

const { addressHeader } = configFromEnv({ ADDRESS_HEADER: "X-Forwarded-For" });

/**
 * Asks for a target exactly as it is written, from another computer as it were.
 * @param from an address in 127.0.0.0/8; all of them are this machine's
 */
export async function ask(url: string, target: string, from: string, headers: Record<string, string> = {}) {
  const { host, hostname, port } = new URL(url);
  const lines = Object.entries({ Host: host, Connection: "close", ...headers }).map(([name, value]) => `${name}: ${value}\r\n`);
  const socket = connect({ host: hostname, port: Number(port), localAddress: from });
  const { promise, resolve, reject } = Promise.withResolvers<string>();
  let text = "";
  socket.on("data", (bytes) => (text += bytes));
  socket.on("close", () => resolve(text));
  socket.on("error", reject);
  socket.write(`GET ${target} HTTP/1.1\r\n${lines.join("")}\r\n`);
  await within(promise, `the answer to ${target}`);
  return { status: Number(text.split(" ")[1]), text };
}

/** Spellings of a path that a relay or a proxy may take for `/metrics`. */
export const METRICS = [
  ..."/metrics /metrics/ //metrics /metrics?x /%6detrics /metrics%2f /metrics;x /metrics%20 /metrics%00 /metrics\\".split(" "),
  ..."/./metrics /%2e/metrics /x/../metrics /x/%2E%2e/metrics /x//../metrics /%zz/../metrics /x%/../metrics".split(" "),
  ..."/\\metrics /x\\..\\metrics /x/..\\metrics /x%5c..%5cmetrics http://HOST/metrics HTTP://HOST/metrics".split(" "),
  ..."http://HOST/x\\..\\metrics https://HOST/metrics http://HOST#/metrics /metrics#x /#/../metrics".split(" "),
];

const SPEED = 30; // a relay of these tests, and its proxy, live so much faster
const fastClock: Clock = {
  now: () => systemClock.now() * SPEED,
  epoch: () => systemClock.epoch(),
  after: (ms, run) => systemClock.after(ms / SPEED, run),
  rest: () => {},
};
const passes = (ms: number) => new Promise<void>((resolve) => void fastClock.after(ms, resolve));

/**
 * Tests a relay behind a proxy.
 * @param hasty replacements that make the proxy's timeouts of 60 s as much shorter as `SPEED` says
 * @param cuts whether these timeouts end a WebSocket on which nothing is said
 */
export function describeBehind(program: Program, hasty: Edits, cuts: boolean): void {
  describe.skipIf(program.whyNot !== "")(`behind ${program.name}${program.whyNot}`, () => {
    test("host and guest talk through WebSockets", async () => {
      await using relay = testRelay();
      await using proxy = await program.start(relay.port);
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
    });

    test("players see why their socket was closed, and that the relay drains", async () => {
      const clock = new TestClock();
      await using relay = testRelay({ clock, drainSeconds: 8 });
      await using proxy = await program.start(relay.port);
      const open = async (room: string, clientId: string) => {
        const client = await Client.open(proxy.url);
        expect(await client.join(room, clientId)).toMatchObject({ type: "joined" });
        return client;
      };
      const host = await Client.open(proxy.url);
      const room = await host.create();
      const replaced = await open(room, "guest");
      const kicked = await open(room, "guest");
      expect(await replaced.closed).toEqual({ code: 4000, reason: "replaced" });
      host.send({ type: "kick", index: 1 });
      expect(await kicked.closed).toEqual({ code: 4002, reason: "kicked" });
      const guest = await open(room, "another");
      host.send({ type: "close_room" });
      expect(await guest.closed).toEqual({ code: 4001, reason: "room closed" });
      expect(await host.closed).toEqual({ code: 4001, reason: "room closed" });
      const last = await Client.open(proxy.url);
      await last.create();
      void relay.drain();
      expect(await last.next()).toEqual({ type: "draining", seconds: 8 });
      clock.advance(8_000);
      expect(await last.closed).toEqual({ code: 1012, reason: "restarting" });
    });

    test("wrong codes count for the client's own address, whatever headers it sends", async () => {
      await using relay = testRelay({ addressHeader, maxMissesPerMinute: 4 });
      await using proxy = await program.start(relay.port);
      const miss = async (from: string, headers?: Record<string, string>) =>
        (await ask(proxy.url, "/room/zzzzzz", from, headers)).status;
      expect(await miss("127.0.0.1")).toBe(404);
      expect(await miss("127.0.0.1", { "X-Forwarded-For": "192.0.2.1" })).toBe(404);
      expect(await miss("127.0.0.1", { "x-forwarded-for": "192.0.2.2, 192.0.2.3" })).toBe(404);
      // Headers that `Connection` names are for the proxy alone, so they are not sent on.
      expect(await miss("127.0.0.1", { Connection: "close, X-Forwarded-For" })).toBe(404);
      expect(await miss("127.0.0.1", { "X-Forwarded-For": "192.0.2.4" })).toBe(429);
      expect(await miss("127.0.0.2")).toBe(404);
    });

    test("who guesses codes over WebSockets is closed with 1008, whatever headers it sends", async () => {
      await using relay = testRelay({ addressHeader, maxMissesPerMinute: 2 });
      await using proxy = await program.start(relay.port);
      const guess = async (header: string) => {
        const guesser = await Client.open(proxy.url, { "X-Forwarded-For": header });
        return { code: (await guesser.join("zzzzzz", "guesser")).code, closed: guesser.closed };
      };
      expect(await guess("192.0.2.1")).toMatchObject({ code: "room_not_found" });
      expect(await guess("192.0.2.2")).toMatchObject({ code: "room_not_found" });
      const third = await guess("192.0.2.3");
      expect(third.code).toBe("too_many_attempts");
      expect(await third.closed).toEqual({ code: 1008, reason: "too many attempts" });
    });

    test("metrics are for the machine itself, however a stranger spells their path", async () => {
      await using relay = testRelay();
      await using proxy = await program.start(relay.port);
      expect((await ask(proxy.url, "/metrics", "127.0.0.1")).text).toContain("party_sockets_clients");
      for (const path of ["/metrics", "/metrics/", "/metrics?x"])
        expect((await ask(proxy.url, path, "127.0.0.2")).status).toBe(403);
      const answers = METRICS.map(async (path) => {
        const { text } = await ask(proxy.url, path.replace("HOST", new URL(proxy.url).host), "127.0.0.2");
        return text.includes("party_sockets") ? path : undefined;
      });
      expect((await Promise.all(answers)).filter(Boolean)).toEqual([]);
    });

    test.concurrent("a silent socket outlives the proxy's timeouts, because the relay pings it", async () => {
      await using relay = testRelay({ clock: fastClock });
      await using still = testRelay(); // its next ping is far behind the same timeouts
      await using proxy = await program.start(relay.port, hasty);
      await using stillProxy = await program.start(still.port, hasty);
      const player = await Client.open(proxy.url);
      const cut = await Client.open(stillProxy.url);
      await player.create();
      await cut.create();
      await passes(80_000);
      expect(await player.soFar()).toEqual([]);
      if (cuts) expect((await cut.closed).code).toBe(1006);
      else expect(await cut.soFar()).toEqual([]);
    });

    test.concurrent("who only talks and is told nothing outlives them too", async () => {
      await using relay = testRelay({ clock: fastClock });
      await using proxy = await program.start(relay.port, hasty);
      const host = await Client.open(relay.url);
      const room = await host.create();
      const phone = await Client.open(proxy.url);
      await phone.join(room, "phone");
      await host.next(); // peer_joined
      for (const end = fastClock.now() + 80_000; fastClock.now() < end; await passes(500)) {
        phone.send({ type: "send", to: 0, data: "still here" }); // so often that the relay has no reason to ping it
        expect(await host.next()).toMatchObject({ type: "message" }); // and not that it left
      }
      expect(await phone.soFar()).toEqual([]);
    });
  });
}
