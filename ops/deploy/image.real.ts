/**
 * The image, built and run as somebody runs it who gives it no more than it needs. The base image is stood in for by Bun, a
 * shell and the libraries that the two load, under the official name: nothing is downloaded.
 */
import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { version } from "../../package.json" with { type: "json" };
import { LIMITS } from "../../server.ts";
import { Client } from "../shared/client.ts";
import { freePort, ROOT } from "../shared/processes.ts";
import { clientFrame, RawSocket } from "../shared/sockets.ts";
import { within } from "../shared/wait.ts";
import { Engine, Failed, TIGHT, whyNoEngine } from "./engine.ts";

const IMAGE = "localhost/party-sockets";
const SOURCE = "https://example.org/party-sockets";

type Image = {
  Labels: Record<string, string>;
  Config: { User: string; ExposedPorts: object; Env: string[] };
  /** Its times are in nanoseconds. */
  Healthcheck: { Timeout: number };
};

describe.skipIf(whyNoEngine !== undefined)(`the image${whyNoEngine ?? ""}`, () => {
  let engine: Engine;
  beforeAll(async () => {
    engine = await Engine.open();
    await engine.buildBun();
    await engine.build(IMAGE, ROOT, `--build-arg=SOURCE=${SOURCE}`);
  });
  afterAll(() => engine[Symbol.asyncDispose]());

  async function inspect(): Promise<Image> {
    const [image] = JSON.parse(await engine.podman("image", "inspect", IMAGE)) as [Image];
    return image;
  }

  /** Starts a relay in a container. @param options podman's */
  async function start(...options: string[]) {
    const port = freePort();
    const name = `relay-${port}`;
    const relay = engine.start(name, `--env=PORT=${port}`, ...options, IMAGE);
    await relay.line(/ listening /);
    return {
      url: `http://localhost:${port}`,
      /** The relay's exit code. */
      exited: relay.exited,
      /** A line of its log. */
      line: (pattern: RegExp) => relay.line(pattern),
      podman: (...command: string[]) => engine.podman(...command, name),
      /** Runs the image's HEALTHCHECK once. */
      async isHealthy(): Promise<boolean> {
        try {
          await engine.podman("healthcheck", "run", name);
          return true;
        } catch (error) {
          if (error instanceof Failed && error.exitCode === 1) return false;
          throw error; // there was no check
        }
      },
      async [Symbol.asyncDispose]() {
        await engine.podman("rm", "--force", "--ignore", "--time=0", name);
        await relay.exited;
      },
    };
  }

  test("names its version, its source, its user and its port, and holds nothing but what runs", async () => {
    const { Labels, Config } = await inspect();
    expect(Labels).toMatchObject({
      "org.opencontainers.image.version": version,
      "org.opencontainers.image.source": SOURCE,
    });
    expect(Config).toMatchObject({ User: "bun", ExposedPorts: { "3000/tcp": {} } });
    expect(Config.Env).toContain("PORT=3000");
    const list = "console.log(require('node:fs').readdirSync('.').toSorted().join(' '))";
    expect(await engine.podman("run", "--rm", IMAGE, "bun", "-e", list)).toBe("regions.ts server.ts");
  });

  test("runs on the least that it can be given; a stop lets a party play on, closes it with 1012 and ends with 0", async () => {
    await using relay = await start(...TIGHT);
    expect(await (await fetch(`${relay.url}/health`)).json()).toEqual({ status: "ok" });
    expect(await relay.isHealthy()).toBe(true);

    const host = await Client.open(relay.url);
    const guest = await Client.open(relay.url);
    const room = await host.create();
    expect(await guest.join(room, "guest")).toEqual({ type: "joined", room, index: 1, peers: [0] });
    expect(await host.next()).toEqual({ type: "peer_joined", index: 1 });
    host.send({ type: "send", data: "go" });
    expect(await guest.next()).toEqual({ type: "message", from: 0, data: "go" });

    const stopped = relay.podman("stop", "--time=10"); // as long as docker waits before it kills
    for (const player of [host, guest]) expect(await player.next()).toEqual({ type: "draining", seconds: LIMITS.drainSeconds });
    guest.send({ type: "send", data: { x: 1 }, to: 0 });
    expect(await host.next()).toEqual({ type: "message", from: 1, data: { x: 1 } });
    for (const player of [host, guest]) expect(await player.closed).toEqual({ code: 1012, reason: "restarting" });
    await stopped;
    expect(await relay.exited).toBe(0);
  });

  test("says what is wrong with a variable, and ends with 1", async () => {
    const relay = engine.start("refused", "--env=PORT=x", IMAGE);
    expect(await relay.exited).toBe(1);
    expect(relay.lines).toContain('PORT must be a whole number from 0 to 65535, not "x"');
  });

  test("is healthy while it drains", async () => {
    await using relay = await start("--env=DRAIN_SECONDS=3");
    const player = await Client.open(relay.url);
    await player.create();
    await relay.podman("kill", "--signal=TERM"); // podman checks no container that it is stopping itself
    expect(await player.next()).toEqual({ type: "draining", seconds: 3 });
    expect(await relay.isHealthy()).toBe(true);
    expect(await player.closed).toEqual({ code: 1012, reason: "restarting" });
    expect(await relay.exited).toBe(0);
  });

  for (const [where, options] of Object.entries({
    "past an HTTP proxy that the environment names": [
      "--env=HTTP_PROXY=http://localhost:1",
      "--env=http_proxy=http://localhost:1",
    ],
    "at the address that it listens on": ["--env=HOST=127.0.0.2"],
    "at an IPv6 address": ["--env=HOST=::1"],
  }))
    test(`is asked for its health ${where}`, async () => {
      await using relay = await start(...options);
      expect(await relay.isHealthy()).toBe(true);
    });

  test("is unhealthy while it hangs: the check ends by itself, in the time that it has; healthy when it goes on", async () => {
    await using relay = await start(...TIGHT);
    await relay.podman("kill", "--signal=STOP");
    const begun = Bun.nanoseconds();
    expect(await relay.isHealthy()).toBe(false); // podman would wait for it forever
    expect(Bun.nanoseconds() - begun).toBeLessThan((await inspect()).Healthcheck.Timeout);
    await relay.podman("kill", "--signal=CONT");
    expect(await relay.isHealthy()).toBe(true);
  });

  test("stands a siege in 256 MB: who sends without end and who doesn't read is cut, and a party plays on", async () => {
    await using relay = await start(...TIGHT, "--env=ADDRESS_HEADER=X-Forwarded-For");
    const from = (address: string) => ({ "X-Forwarded-For": address });
    const host = await Client.open(relay.url, from("192.0.2.1"));
    const guest = await Client.open(relay.url, from("192.0.2.2"));
    await guest.join(await host.create(), "guest");
    await host.next(); // peer_joined

    const unread = await joinAndNotRead(relay.url, from("192.0.2.4")); // first: once memory is full nobody may join
    const siege = Promise.all([relay.isHealthy(), sendWithoutEnd(relay.url, from("192.0.2.3"))]);
    for (let n = 0; n < 20; n++) unread.send({ type: "send", data: "x".repeat(250 * 1024) });
    let isOver = false;
    void siege.finally(() => (isOver = true));
    for (let n = 0; !isOver; n++) {
      host.send({ type: "send", data: n });
      expect(await within(guest.next(), "a message in the siege")).toEqual({ type: "message", from: 0, data: n });
    }
    expect((await siege)[0]).toBe(true);
    await relay.line(/ cap reached cap=memory/);
  });
});

/** Fills memory by messages that never end: more of them than a container of 256 MB can hold. */
async function sendWithoutEnd(url: string, headers: Record<string, string>): Promise<void> {
  const unfinished = clientFrame("x".repeat(254 * 1024), { fin: false });
  for (let wave = 0; wave < 12; wave++)
    await Promise.all(
      Array.from({ length: 100 }, async () => {
        const socket = await RawSocket.open(url, "/", headers);
        socket.write(unfinished);
      }),
    );
}

/** Fills a room with members that don't read. @returns its host */
async function joinAndNotRead(url: string, headers: Record<string, string>): Promise<RawSocket> {
  const host = await RawSocket.open(url, "/", headers);
  host.send({ type: "create", clientId: "host", maxClients: 1000 });
  const { room } = await host.next();
  await Promise.all(
    Array.from({ length: 300 }, async (_, i) => {
      const member = await RawSocket.open(url, "/", headers);
      member.send({ type: "join", clientId: `member ${i}`, room });
      await member.next();
      member.pause();
    }),
  );
  return host;
}
