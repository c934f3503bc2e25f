/** Three relays behind nginx, as nginx-cluster.conf and nginx-relays.conf set it up. */
import { describe, expect, test } from "bun:test";
import { rm } from "node:fs/promises";
import { join } from "node:path";
import { Client } from "../shared/client.ts";
import { parseMetrics, scrape } from "../shared/metrics.ts";
import { Child, freePort, RelayProcess, ROOT, run } from "../shared/processes.ts";
import { handshake, RawSocket } from "../shared/sockets.ts";
import { until, within } from "../shared/wait.ts";
import { ask, METRICS } from "./behind.ts";
import { CLUSTER_IDS, nginx, peersEnv, type Proxy, startClusterNginx, startNginx } from "../shared/proxies.ts";

type Cluster = AsyncDisposable & {
  /** Where nginx listens. */
  url: string;
  nginx: Proxy;
  /** The relays, by their ids. */
  relays: Map<string, RelayProcess>;
  ids: string[];
  /** Starts a relay again. */
  start(id: string): Promise<void>;
  /** Starts another nginx, that opens all new sockets and asks all codes at these relays first. */
  entrance(...ids: string[]): Promise<Proxy>;
  /** A client in a new room, on each of the relays, through nginx. */
  hosts(): Promise<{ id: string; room: string; host: Client }[]>;
};

/** Starts three relays, named by their ports, and nginx. @param env more variables of the relays @param settings more of nginx */
async function startCluster(env: Record<string, string> = {}, settings = ""): Promise<Cluster> {
  await using starting = new AsyncDisposableStack();
  let stack = starting;
  const ids = Array.from({ length: 3 }, () => `${freePort()}`);
  const relays = new Map<string, RelayProcess>();
  const start = async (id: string) => {
    relays.set(id, stack.use(await RelayProcess.start({ ...peersEnv(ids), PORT: id, INSTANCE_ID: id, ...env })));
  };
  await Promise.all(ids.map(start));
  const edits = {
    "worker_processes 1": "worker_processes 2",
    "http { include": `http { ${settings} include`,
  };
  const entrance = async (...chosen: string[]): Promise<Proxy> => stack.use(await startClusterNginx(chosen, edits));
  const proxy = await entrance(...ids);
  stack = starting.move();
  return {
    url: proxy.url,
    nginx: proxy,
    relays,
    ids,
    start,
    entrance,
    async hosts() {
      return Promise.all(
        ids.map(async (id) => {
          const host = await Client.open(`${proxy.url}/?instance=${id}`);
          return { id, host, room: await host.create() };
        }),
      );
    },
    [Symbol.asyncDispose]: () => stack.disposeAsync(),
  };
}

const unknown = "1abcde"; // a code that no room has

const HUNG_MS = 15_000; // proxy_read_timeout
const SLACK_MS = 5_000; // what a busy machine may need beyond what is promised

/** The sum of a counter of all relays, with any labels or with this `outcome`. */
async function sum({ relays }: Cluster, counter: string, outcome?: string): Promise<number> {
  const samples = (await Promise.all([...relays.values()].map(async ({ url }) => parseMetrics(await scrape(url))))).flat();
  const wanted = samples.filter(({ name, labels }) => name === counter && (outcome ?? labels.outcome) === labels.outcome);
  return wanted.reduce((total, { value }) => total + value, 0);
}

/** Opens a socket without a code and creates a room. @returns the client and the relay that has taken it */
async function create(url: string): Promise<{ client: Client; instance: string }> {
  const client = await Client.open(url);
  const { instance } = await client.ask({ type: "create", clientId: "newcomer", maxClients: 2 });
  return { client, instance };
}

/** Does so, and leaves. @returns the relay that has taken it */
async function newcomer(url: string): Promise<string> {
  const { client, instance } = await create(url);
  await client.close();
  return instance;
}

/** A party on each relay: a host and a guest, through nginx. */
async function parties(cluster: Cluster) {
  return Promise.all(
    (await cluster.hosts()).map(async ({ id, room, host }) => {
      const { client: guest } = await joins(`${cluster.url}/${room}`, room, "guest");
      await host.next(); // peer_joined
      return { id, room, host, guest };
    }),
  );
}

type Party = Awaited<ReturnType<typeof parties>>[number];

/** Sees that what the host says now is the next thing that the guest hears. */
async function goesOn({ host, guest }: Party): Promise<void> {
  const data = Math.random();
  host.send({ type: "send", data });
  expect(await guest.next()).toEqual({ type: "message", from: 0, data });
}

/** Joins with a socket to a path. @returns the client and the answer to its join */
async function joins(url: string, room: string, clientId: string) {
  const client = await Client.open(url);
  return { client, answer: await client.join(room, clientId) };
}

describe.skipIf(nginx.whyNot !== "")(`three relays behind nginx${nginx.whyNot}`, () => {
  test("take new sockets in turn", async () => {
    await using cluster = await startCluster();
    const taken: string[] = [];
    for (const _ of [1, 2])
      taken.push(...(await Promise.all(cluster.ids.map(async () => (await create(cluster.url)).instance))).toSorted());
    expect(taken).toEqual([...cluster.ids.toSorted(), ...cluster.ids.toSorted()]);
  });

  test("take new sockets where there are fewest", async () => {
    await using cluster = await startCluster();
    const hosts = await Promise.all([1, 2, 3, 4, 5, 6].map(() => create(cluster.url)));
    const [{ instance: crowded } = { instance: "" }] = hosts;
    for (const { client, instance } of hosts) if (instance !== crowded) client.terminate();
    for (const [id, { url }] of cluster.relays)
      if (id !== crowded)
        await until("nobody to be there", async () => (await (await fetch(url)).text()).endsWith("clients: 0\n"));
    const opened = [1, 2, 3, 4].map(async () => (await create(cluster.url)).instance);
    expect(await Promise.all(opened)).not.toContain(crowded);
  });

  test("find a room from every entrance, by code and by pin, over HTTP and for WebSockets", async () => {
    await using cluster = await startCluster();
    const hosts = await cluster.hosts();
    for (const entranceId of cluster.ids) {
      const { url: entrance } = await cluster.entrance(entranceId);
      for (const { id, room, host } of hosts) {
        const lookUp = await fetch(`${entrance}/room/${room}`);
        expect({ status: lookUp.status, by: lookUp.headers.get("X-Instance-Id") }).toEqual({ status: 200, by: id });
        expect(await lookUp.json()).toEqual({ clients: 1, maxClients: 8, origin: "unknown" });
        for (const path of [`/${room}`, `/?instance=${id}`, `/any/path?x=%2f&instance=${id}`]) {
          const { client, answer } = await joins(entrance + path, room, "guest");
          expect(answer).toMatchObject({ type: "joined", peers: [0] });
          const { index } = await host.next();
          host.send({ type: "send", to: index, data: "welcome" });
          expect(await client.next()).toEqual({ type: "message", from: 0, data: "welcome" });
          client.send({ type: "leave" });
          expect(await host.next()).toEqual({ type: "peer_left", index, reason: "left" });
        }
      }
    }
  });

  test("find a room by its code beside the pin of another relay", async () => {
    await using cluster = await startCluster();
    const hosts = await cluster.hosts();
    for (const { room } of hosts)
      for (const { id } of hosts) {
        const { answer } = await joins(`${cluster.url}/${room}?instance=${id}`, room, `by ${id}`);
        expect(answer).toMatchObject({ type: "joined" });
        expect((await fetch(`${cluster.url}/room/${room}?instance=${id}`)).status).toBe(200);
      }
  });

  test("give a player who comes back its slot, and its old socket 4000", async () => {
    await using cluster = await startCluster();
    for (const { id, room } of await cluster.hosts()) {
      const { client: old } = await joins(`${cluster.url}/${room}`, room, "guest");
      const { client, answer } = await joins(`${cluster.url}/${room}`, room, "guest");
      expect(answer).toMatchObject({ type: "joined", index: 1 });
      expect(await old.closed).toEqual({ code: 4000, reason: "replaced" });
      client.terminate();
      const again = await joins(`${cluster.url}/?instance=${id}`, room, "guest");
      expect(again.answer).toMatchObject({ type: "joined", index: 1 });
    }
  });

  test("ignore a pin to a relay that there never was", async () => {
    await using cluster = await startCluster();
    const [{ room } = { room: "" }] = await cluster.hosts();
    for (const pin of ["4599", "nobody", "..", "4501;x", "", "%0d%0aX-Accel-Redirect:%20/@relay/1"]) {
      expect((await fetch(`${cluster.url}/room/${room}?instance=${pin}`, { redirect: "manual" })).status).toBe(200);
      expect((await joins(`${cluster.url}/${room}?instance=${pin}`, room, "guest")).answer).toMatchObject({ type: "joined" });
    }
  });

  test("ask each other once at most for a code that nobody has", async () => {
    await using cluster = await startCluster();
    const { url: entrance } = await cluster.entrance(cluster.ids[0] as string);
    expect((await fetch(`${entrance}/room/${unknown}`)).status).toBe(404);
    const { answer } = await joins(`${entrance}/1abcdf`, "1abcdf", "guest");
    expect(answer).toMatchObject({ code: "room_not_found" });
    expect(await sum(cluster, "party_sockets_probes_total")).toBe(2 + 2);
  });

  test("count wrong codes for the client's own address, whatever headers it sends", async () => {
    await using cluster = await startCluster({ MAX_MISSES_PER_MINUTE: "3" });
    const { url: entrance } = await cluster.entrance(cluster.ids[0] as string);
    const headers: Record<string, string>[] = [
      { "X-Forwarded-For": "192.0.2.1" },
      { "X-Party-Probe": "1" },
      { "X-Relay-Src": "1", "X-Relay-Failed": "1", "X-Party-Probe": "1", Connection: "close, X-Forwarded-For" },
    ];
    const look = async (from: string, more: Record<string, string>, code = unknown) =>
      (await ask(entrance, `/room/${code}`, from, more)).status;
    for (const more of headers) expect(await look("127.0.0.1", more)).toBe(404);
    for (const more of headers) expect(await look("127.0.0.1", more)).toBe(429);
    expect(await look("127.0.0.2", {})).toBe(404);
  });

  test("find a room for a client that claims to have been sent on, or that this failed", async () => {
    await using cluster = await startCluster();
    const { url: entrance } = await cluster.entrance(cluster.ids[0] as string);
    const forged = { "X-Relay-Src": "1", "X-Relay-Failed": "1", "X-Accel-Redirect": "/health", "X-Party-Probe": "1" };
    for (const { id, room } of await cluster.hosts()) {
      expect((await ask(entrance, `/room/${room}`, "127.0.0.1", forged)).status).toBe(200);
      for (const path of [`/${room}`, `/?instance=${id}`]) {
        const client = await Client.open(entrance + path, forged);
        expect(await client.join(room, "guest")).toMatchObject({ type: "joined" });
      }
    }
  });

  test("are not to be picked by a path from outside", async () => {
    await using cluster = await startCluster();
    const [id = ""] = cluster.ids;
    const paths = [`/@relay/${id}`, "/@relay/", `/%40relay/${id}`, `//@relay/${id}`, `/x/../@relay/${id}`, `/@relay/${id}?x`];
    for (const path of [...paths, "/@relay/a/b", "/@relay/127.0.0.1:1", "/@relay/metrics"]) {
      expect({ path, status: (await ask(cluster.url, path, "127.0.0.1")).status }).toEqual({ path, status: 404 });
      const raw = await RawSocket.connect(cluster.url);
      raw.write(handshake(path));
      expect(await raw.head()).toStartWith("HTTP/1.1 404 ");
    }
  });

  test("show nobody their metrics", async () => {
    await using cluster = await startCluster();
    for (const path of ["/metrics", "/metrics/", "/metrics?x", `/metrics?instance=${cluster.ids[0]}`])
      expect((await ask(cluster.url, path, "127.0.0.1")).status).toBe(403);
    const host = new URL(cluster.url).host;
    const answers = METRICS.flatMap((path) => [path, `${path}?instance=${cluster.ids[0]}`]).map(async (path) => {
      const { text } = await ask(cluster.url, path.replace("HOST", host), "127.0.0.1");
      return text.includes("party_sockets") ? path : undefined;
    });
    expect((await Promise.all(answers)).filter(Boolean)).toEqual([]);
  });

  test("take no other method than a relay alone, and say so as it does", async () => {
    await using cluster = await startCluster();
    const [relay] = cluster.relays.values();
    const read = async (url: string, method: string) => {
      const { status, headers } = await fetch(`${url}/health`, { method });
      const names = ["allow", "access-control-allow-origin", "access-control-expose-headers", "content-type"];
      return { status, ...Object.fromEntries(names.map((name) => [name, headers.get(name)])) };
    };
    for (const method of ["POST", "DELETE", "PROPFIND"])
      expect(await read(cluster.url, method)).toEqual(await read(relay!.url, method));
  });

  test("are not taken for dead because of what a client sends", async () => {
    await using cluster = await startCluster();
    const requests = [
      ...["POST", "PUT", "FOO", "TRACE", "PROPFIND"].map((method) => `${method} / HTTP/1.1\r\nHost: x\r\n\r\n`),
      `GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n${"x".repeat(100_000)}`,
      "GET / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
      `GET / HTTP/1.1\r\nHost: x\r\n${`A: ${"x".repeat(8_000)}\r\n`.repeat(3)}\r\n`,
      `GET / HTTP/1.1\r\nHost: x\r\n${"A: x\r\n".repeat(500)}\r\n`,
      handshake(`/${"x".repeat(8_000)}`),
      handshake("/", { "Sec-WebSocket-Extensions": "x".repeat(8_000) }),
      handshake("/", { "Sec-WebSocket-Key": "x" }),
      handshake("/", { Host: "[::1]:99999" }),
      handshake("/", { Upgrade: "h2c" }),
    ];
    for (const request of requests) {
      const raw = await RawSocket.connect(cluster.url);
      raw.write(request);
      expect(await within(raw.head(), `the answer to ${request.slice(0, 100)}`)).toStartWith("HTTP/1.1 ");
      raw.reset();
    }
    expect(cluster.nginx.process.lines.filter((line) => /upstream|crit|alert/.test(line))).toEqual([]);
  });

  test("go on, all of them, if a client has made nginx believe that each of them failed", async () => {
    await using cluster = await startCluster({}, "proxy_buffer_size 1k;");
    const hosts = await cluster.hosts();
    for (let n = 0; n < 4 * cluster.ids.length; n++) {
      const raw = await RawSocket.connect(cluster.url);
      raw.write(handshake("/", { "Sec-WebSocket-Protocol": "x".repeat(1_000) })); // comes back, in an answer too long for this nginx
      expect(await raw.head()).toStartWith("HTTP/1.1 502 ");
    }
    const disabled = cluster.nginx.process.lines.filter((line) => line.includes("temporarily disabled"));
    expect(disabled.length).toBeGreaterThanOrEqual(cluster.ids.length);
    expect(new Set([await newcomer(cluster.url), await newcomer(cluster.url), await newcomer(cluster.url)]).size).toBe(3);
    for (const { id, room } of hosts) {
      expect((await fetch(`${cluster.url}/room/${room}`)).status).toBe(200);
      expect((await joins(`${cluster.url}/${room}`, room, "guest")).answer).toMatchObject({ type: "joined" });
      expect((await joins(`${cluster.url}/?instance=${id}`, room, "another")).answer).toMatchObject({ type: "joined" });
    }
  });

  test("lose one that is killed: its rooms are over, and nothing else is", async () => {
    await using cluster = await startCluster();
    const [lost, ...others] = (await parties(cluster)) as [Party, Party, Party];
    cluster.relays.get(lost.id)!.signal("SIGKILL");
    for (const player of [lost.host, lost.guest]) expect((await player.closed).code).toBe(1006);
    for (const party of others) await goesOn(party);
    for (const _ of [1, 2, 3, 4]) expect(await newcomer(cluster.url)).not.toBe(lost.id);
    for (const { id, room } of others) {
      expect((await fetch(`${cluster.url}/room/${room}`)).status).toBe(200);
      for (const path of [`/${room}`, `/?instance=${id}`])
        expect((await joins(cluster.url + path, room, path)).answer).toMatchObject({ type: "joined" });
    }
    expect((await fetch(`${cluster.url}/room/${lost.room}`)).status).toBe(404);
    for (const path of [`/${lost.room}`, `/?instance=${lost.id}`])
      expect((await joins(cluster.url + path, lost.room, "guest")).answer).toMatchObject({ code: "room_not_found" });
    const stale = await fetch(`${cluster.url}//elsewhere/x?a=1&instance=${lost.id}`, { redirect: "manual" });
    expect({ status: stale.status, location: stale.headers.get("Location") }).toEqual({
      status: 302,
      location: "/elsewhere/x?a=1",
    });

    cluster.relays.delete(lost.id);
    expect(await sum(cluster, "party_sockets_replays_total", "failed")).toBe(2); // the two pins
    await cluster.start(lost.id);
    expect((await create(`${cluster.url}/?instance=${lost.id}`)).instance).toBe(lost.id);
  });

  test("drain one after another: its party goes on, newcomers meet the others, nobody is refused", async () => {
    await using cluster = await startCluster({ DRAIN_SECONDS: "60" });
    const [draining, ...others] = (await parties(cluster)) as [Party, Party, Party];
    const relay = cluster.relays.get(draining.id)!;
    const { url: doorstep } = await cluster.entrance(draining.id); // who is sent to the one that drains, for a code or a pin
    relay.signal("SIGTERM");
    for (const player of [draining.host, draining.guest]) expect(await player.next()).toEqual({ type: "draining", seconds: 60 });
    for (const _ of [1, 2, 3, 4]) expect(await newcomer(cluster.url)).not.toBe(draining.id);
    for (const path of [
      `//${draining.room}`,
      "//1abcde",
      "/%31abcde",
      "/room/",
      "/room//1abcde",
      "/room/1abcde/",
      "/x/../1abcde",
    ]) {
      const entrance = await cluster.entrance(...cluster.ids); // one that hasn't found out yet
      for (const _ of [1, 2, 3]) {
        const raw = await RawSocket.connect(entrance.url);
        raw.write(handshake(path));
        expect({ path, head: (await raw.head()).slice(0, 12) }).toEqual({ path, head: "HTTP/1.1 101" });
      }
    }
    await goesOn(draining);
    for (const url of [cluster.url, doorstep])
      for (const { id, room } of [draining, ...others]) {
        expect((await fetch(`${url}/room/${room}`)).status).toBe(200);
        for (const path of [`/${room}`, `/?instance=${id}`])
          expect((await joins(url + path, room, `${url}${path}`)).answer).toMatchObject({ type: "joined" });
      }
    draining.host.send({ type: "close_room" });
    expect(await draining.guest.closed).toEqual({ code: 4001, reason: "room closed" });
    expect(await within(relay.exited, "the relay's end")).toBe(0);
    for (const { host, guest } of others) {
      await host.soFar();
      await guest.soFar();
    }
    for (const party of others) await goesOn(party);
  });

  test("refuse searches beyond their limit without nginx asking the next", async () => {
    await using cluster = await startCluster();
    const [id = "", ...others] = cluster.ids;
    const entrance = await cluster.entrance(id);
    for (const other of others) cluster.relays.get(other)!.signal("SIGSTOP"); // so that each search takes its second
    const rounds: [path: string, searched: number, headers?: Record<string, string>][] = [
      ["/CODE", 200],
      ["/room/CODE", 404],
      ["/./CODE", 200],
      ["/x/../room/CODE", 404],
      ["/room\\CODE", 404],
      ["/CODE?x=y", 200, { Upgrade: "a b" }],
    ];
    const statuses = rounds.map(async ([path, , headers], n) => {
      const codes = Array.from({ length: 12 }, (_, i) => `1ab${n + 1}d${"ABCDEFGHJKLM"[i]}`);
      const asked = codes.map((code) => ask(entrance.url, path.replace("CODE", code), `127.0.0.${n + 2}`, headers));
      return (await Promise.all(asked)).map(({ status }) => status).toSorted();
    });
    expect(await Promise.all(statuses)).toEqual(
      rounds.map(([, searched]) => [...Array<number>(8).fill(searched), ...Array<number>(4).fill(503)]),
    );
    expect(entrance.process.lines.filter((line) => line.includes("upstream"))).toEqual([]);
  });

  test.concurrent("keep players who say nothing for longer than nginx waits", async () => {
    await using cluster = await startCluster();
    const quiet = await parties(cluster);
    const late = await Promise.all(quiet.map(({ room }) => joins(`${cluster.url}/room/${room}`, room, "late")));
    for (const { host, guest } of quiet) for (const player of [host, guest]) await player.next(); // peer_joined
    await Bun.sleep(HUNG_MS + SLACK_MS);
    const players = [...quiet.flatMap(({ host, guest }) => [host, guest]), ...late.map(({ client }) => client)];
    for (const player of players) expect(await player.soFar()).toEqual([]);
  });

  test.concurrent("cut the players of one that hangs, find the others' rooms at once, and let their parties go on", async () => {
    await using cluster = await startCluster();
    const [hung, ...others] = (await parties(cluster)) as [Party, Party, Party];
    const relay = cluster.relays.get(hung.id)!;
    relay.signal("SIGSTOP");
    // nginx may begin with the one that hangs, and then with another one, which asks it for 1 s.
    const lookUp = (code: string) =>
      within(fetch(`${cluster.url}/room/${code}`), "the look-up", 2_000 + 1_000 + SLACK_MS).then(({ status }) => status);
    expect(await Promise.all([hung.room, unknown, ...others.map(({ room }) => room)].map(lookUp))).toEqual([404, 404, 200, 200]);
    for (const { id, room } of others)
      for (const path of [`/${room}`, `/?instance=${id}`]) {
        const joined = joins(cluster.url + path, room, path);
        expect((await within(joined, "the join", SLACK_MS)).answer).toMatchObject({ type: "joined" });
      }
    const pinned = joins(`${cluster.url}/?instance=${hung.id}`, hung.room, "late");
    const { answer } = await within(pinned, "the join with a pin", HUNG_MS + SLACK_MS);
    expect(answer).toMatchObject({ code: "room_not_found" });
    for (const player of [hung.host, hung.guest])
      expect((await within(player.closed, "the end of its sockets", HUNG_MS + SLACK_MS)).code).toBe(1006);
    for (const { host, guest } of others) await Promise.all([host.soFar(), guest.soFar()]);
    for (const party of others) await goesOn(party);
    relay.signal("SIGCONT");
    expect((await create(`${cluster.url}/?instance=${hung.id}`)).instance).toBe(hung.id);
  });
});

const whyNoNetworks =
  process.getuid?.() === 0 && Bun.which("ip") !== null
    ? nginx.whyNot
    : " (skipped: network namespaces need root, and ip of Debian's iproute2)";

/**
 * Relays and nginx in a network of their own, which another computer, outside, reaches at 10.78.0.2 only.
 * @param relaysFile of this directory
 * @param relays variables of each
 * @param names lines of the network's /etc/hosts; its DNS server says nothing
 */
async function startAway(relaysFile: string, relays: Record<string, string>[], names: string[] = []) {
  await using stack = new AsyncDisposableStack();
  const ip = async (command: string) => {
    const { exitCode, stderr } = await run(["ip", ...command.split(" ")]);
    if (exitCode !== 0) throw new Error(`ip ${command}: ${stderr}`);
  };
  const inside = `party-sockets-${process.pid}-inside`;
  const outside = `party-sockets-${process.pid}-outside`;
  for (const name of [inside, outside]) {
    await ip(`netns add ${name}`);
    stack.defer(() => ip(`netns del ${name}`));
    await ip(`-n ${name} link set lo up`);
  }
  await ip(`link add name eth0 netns ${inside} type veth peer name eth0 netns ${outside}`);
  await ip(`-n ${inside} addr add 10.78.0.2/24 dev eth0`);
  await ip(`-n ${outside} addr add 10.78.0.1/24 dev eth0`);
  for (const name of [inside, outside]) await ip(`-n ${name} link set eth0 up`);
  await ip(`-n ${outside} route add default via 10.78.0.2`);
  // What is sent to 10.77.0.13 is lost without a sign, as if that computer were dead.
  await ip(`-n ${inside} link add relays type bridge`);
  await ip(`-n ${inside} addr add 10.77.0.10/24 dev relays`);
  for (const { HOST = "" } of relays.filter((env) => env.HOST?.startsWith("10.")))
    await ip(`-n ${inside} addr add ${HOST}/24 dev relays`);
  await ip(`-n ${inside} link set relays up`);
  await ip(`-n ${inside} neigh add 10.77.0.13 lladdr 02:00:00:00:00:13 dev relays nud permanent`);

  const etc = `/etc/netns/${inside}`; // `ip netns exec` puts these in place of the host's
  stack.defer(() => rm(etc, { recursive: true }));
  await Bun.write(`${etc}/hosts`, names.map((line) => `${line}\n`).join(""));
  await Bun.write(`${etc}/resolv.conf`, "nameserver 10.77.0.13\n");

  const enter = (name: string) => ["ip", "netns", "exec", name];
  for (const env of relays) {
    const relay = stack.use(new Child([...enter(inside), process.execPath, "run", "server.ts"], { env }));
    await relay.line(/ listening /);
  }
  const edits = { "http {": `http { include ${join(import.meta.dir, relaysFile)};` };
  stack.use(await startNginx("http://10.78.0.2", "nginx-cluster.conf", edits, enter(inside)));
  const running = stack.move();
  const runIn = async (name: string, program: string): Promise<unknown> => {
    const begin = `import { Client } from "${ROOT}/ops/shared/client.ts"; const done = (it) => console.log(JSON.stringify(it));`;
    const script = `${begin}${program};process.exit(0)`;
    const { exitCode, stdout, stderr } = await run([...enter(name), process.execPath, "-e", script]);
    if (exitCode !== 0) throw new Error(stderr);
    return JSON.parse(stdout);
  };
  return {
    /** Runs a program outside. @param program what it does after importing Client @returns what it gives to `done` */
    outside: (program: string) => runIn(outside, program),
    /** Runs it inside, as nginx does. */
    inside: (program: string) => runIn(inside, program),
    [Symbol.asyncDispose]: () => running.disposeAsync(),
  };
}

describe("a relay of a cluster", () => {
  const right = { PORT: "0", PEERS: "a,b", INSTANCE_ID: "a", PEER_ADDRESS: "{id}:3000", HOST: "127.0.0.1" };
  const mistakes: [Record<string, string>, string][] = [
    [{ HOST: "" }, "HOST must be set if PEERS is"],
    [{ HOST: "203.0.113.1" }, "HOST 203.0.113.1"], // not this machine's
    [{ INSTANCE_ID: "" }, "INSTANCE_ID must be one of PEERS"],
    [{ PEER_ADDRESS: "relay:3000" }, "PEER_ADDRESS must be a host and port with {id} in it"],
    [{ PEER_ADDRESS: "" }, "PORT must be set if PEERS is"],
    [{ FLY_APP_NAME: "party" }, "PEERS must be left out if FLY_APP_NAME is set"],
  ];
  for (const [mistake, message] of mistakes)
    test(`that is started with ${new URLSearchParams(mistake)} ends and says why`, async () => {
      await using relay = new Child([process.execPath, "run", "server.ts"], { env: { ...right, ...mistake } });
      expect(await within(relay.exited, "its end")).toBe(1);
      expect(relay.lines.join("\n")).toContain(message);
    });
});

describe.skipIf(whyNoNetworks !== "")(`from another computer${whyNoNetworks}`, () => {
  test("nginx is reached, and no relay of the same machine, which listen at 127.0.0.1", async () => {
    await using away = await startAway(
      "nginx-relays.conf",
      CLUSTER_IDS.map((id) => ({ ...peersEnv(CLUSTER_IDS), PORT: id, INSTANCE_ID: id })),
    );
    expect(
      await away.outside(`
        const room = await (await Client.open("http://10.78.0.2")).create();
        const { type } = await (await Client.open("http://10.78.0.2/" + room)).join(room, "guest");
        const relays = [${CLUSTER_IDS}].map((port) => fetch("http://10.78.0.2:" + port + "/health").then(() => "reached", ({ code }) => code));
        done({ type, relays: await Promise.all(relays) })`),
    ).toEqual({ type: "joined", relays: CLUSTER_IDS.map(() => "ECONNREFUSED") });
  });

  test("a dead machine costs a second, and hides no room of another one", async () => {
    const common = { PEERS: "11,12,13", PEER_ADDRESS: "10.77.0.{id}:3000", PORT: "3000" };
    await using away = await startAway(
      "compose.relays.conf", // 13 is dead
      ["11", "12"].map((id) => ({ ...common, INSTANCE_ID: id, HOST: `10.77.0.${id}` })),
    );
    expect(
      await away.outside(`
        const url = "http://10.78.0.2";
        const late = [];
        const soon = async (promise, what) => {
          const begun = performance.now();
          const it = await promise;
          if (performance.now() - begun > 1_000 + ${SLACK_MS}) late.push(what);
          return it;
        };
        const joins = async (path, room) => (await (await Client.open(url + path)).join(room, path)).code ?? "joined";
        const status = async (code) => (await fetch(url + "/room/" + code)).status;
        const hosts = await soon(Promise.all([1, 2, 3].map(() => Client.open(url))), "new sockets");
        const rooms = await Promise.all(hosts.map((host) => host.create()));
        const codes = await soon(Promise.all(rooms.map((room) => joins("/" + room, room))), "codes");
        const pin = await soon(joins("/?instance=13", "${unknown}"), "a pin");
        const lookUps = [await soon(status(rooms[0]), "a look-up"), await soon(status("${unknown}"), "an unknown code")];
        done({ codes, pin, lookUps, late })`),
    ).toEqual({ codes: ["joined", "joined", "joined"], pin: "room_not_found", lookUps: [200, 404], late: [] });
  });

  test("names that hang in DNS hide no room of a peer that has one", async () => {
    const common = { PEERS: "11,12,lost,mislaid,forgotten", PEER_ADDRESS: "{id}.relay:3000", PORT: "3000" };
    await using away = await startAway(
      "compose.relays.conf",
      ["11", "12"].map((id) => ({ ...common, INSTANCE_ID: id, HOST: `10.77.0.${id}` })),
      ["10.77.0.11 11.relay", "10.77.0.10 12.relay", "10.77.0.12 12.relay"], // the first of its two addresses refuses
    );
    expect(
      await away.inside(`
        const room = await (await Client.open("http://10.77.0.12:3000")).create();
        const lookUp = async (code, from) => {
          const headers = { "X-Forwarded-For": from };
          const answer = await fetch("http://10.77.0.11:3000/room/" + code, { headers, redirect: "manual" });
          return answer.headers.get("X-Accel-Redirect") ?? answer.status;
        };
        const letters = [..."ABCDEFGHJKLMNPQRSTUVWXYZ"];
        const guess = async (letter, i) => {
          for (const n of [1, 2, 3, 4]) await lookUp("1abc" + n + letter, "192.0.2." + i);
        };
        await Promise.all(letters.map(guess)); // 24 searches at once, four times; each asks three names that hang
        done(await lookUp(room, "198.51.100.1"))`),
    ).toBe("/@relay/12");
  });
});
