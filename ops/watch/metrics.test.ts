/** The numbers on `/metrics` after traffic that the test knows, and their form as Prometheus reads it. */
import { describe, expect, test } from "bun:test";
import { heapStats } from "bun:jsc";
import { version } from "../../package.json" with { type: "json" };
import { flyCluster, type Config, type RelayHandle, type Siblings } from "../../server.ts";
import { Client } from "../shared/client.ts";
import { parseMetrics, readMetric, scrape } from "../shared/metrics.ts";
import { TestClock, testRelay } from "../shared/relay.ts";
import { RawSocket } from "../shared/sockets.ts";

/** The one value of a metric without labels of its own. */
const readOne = async (relay: RelayHandle, name: string): Promise<number | undefined> => (await readMetric(relay.url, name))[""];

/** Only what isn't 0, so that a test states what its traffic caused. */
const counted = (values: Record<string, number>): Record<string, number> =>
  Object.fromEntries(Object.entries(values).filter(([, value]) => value !== 0));

describe("every series", () => {
  test("of the specification is there with a type, a help and no other", async () => {
    await using relay = testRelay();
    const text = await scrape(relay.url);
    const types = Object.fromEntries([...text.matchAll(/^# TYPE (\S+) (\S+)$/gm)].map(([, name, type]) => [name, type]));
    expect(types).toEqual({
      party_sockets_clients: "gauge",
      party_sockets_rooms: "gauge",
      party_sockets_clients_by_origin: "gauge",
      party_sockets_rooms_by_origin: "gauge",
      party_sockets_connections_total: "counter",
      party_sockets_rooms_created_total: "counter",
      party_sockets_origins_tracked: "gauge",
      party_sockets_messages_total: "counter",
      party_sockets_bytes_total: "counter",
      party_sockets_errors_total: "counter",
      party_sockets_joins_total: "counter",
      party_sockets_disconnects_total: "counter",
      party_sockets_replays_total: "counter",
      party_sockets_probes_total: "counter",
      party_sockets_paused_total: "counter",
      party_sockets_draining: "gauge",
      party_sockets_event_loop_lag_seconds: "gauge",
      process_resident_memory_bytes: "gauge",
      process_heap_used_bytes: "gauge",
      process_uptime_seconds: "gauge",
    });
    const helped = [...text.matchAll(/^# HELP (\S+) \S/gm)].map(([, name]) => name);
    expect(helped).toEqual(Object.keys(types));
  });

  test("is labelled with instance, region in upper case and version", async () => {
    await using relay = testRelay({ instance: "m1", region: "ams" });
    for (const { labels } of parseMetrics(await scrape(relay.url)))
      expect(labels).toMatchObject({ instance: "m1", region: "AMS", version });
  });

  test("says local if instance and region are unset", async () => {
    await using relay = testRelay();
    for (const { labels } of parseMetrics(await scrape(relay.url)))
      expect(labels).toMatchObject({ instance: "local", region: "local" });
  });

  test("is served as Prometheus' text format", async () => {
    await using relay = testRelay();
    const { headers } = await fetch(`${relay.url}/metrics`);
    expect(headers.get("content-type")).toBe("text/plain; version=0.0.4; charset=utf-8");
  });

  test("with a closed set of labels starts at 0, so that a first event is a rise", async () => {
    await using relay = testRelay();
    const labelsOf = async (name: string) => Object.keys(await readMetric(relay.url, name));
    expect(await labelsOf("party_sockets_messages_total")).toEqual(["in", "out"]);
    expect(await labelsOf("party_sockets_bytes_total")).toEqual(["in", "out"]);
    expect(await labelsOf("party_sockets_joins_total")).toEqual(["new", "resumed", "replaced"]);
    expect(await labelsOf("party_sockets_disconnects_total")).toEqual([
      "left",
      "lost",
      "kicked",
      "replaced",
      "room_closed",
      "slow",
      "shutdown",
    ]);
    expect(await labelsOf("party_sockets_errors_total")).toContainAllValues([
      "bad_json",
      "unknown_type",
      "bad_request",
      "already_in_room",
      "not_in_room",
      "not_host",
      "room_not_found",
      "claim_not_found",
      "peer_away",
      "room_full",
      "room_locked",
      "kicked",
      "peer_not_found",
      "state_too_large",
      "draining",
      "capacity",
      "too_many_attempts",
      "internal",
    ]);
  });

  test("names neither a room nor a clientId", async () => {
    await using relay = testRelay();
    const host = await Client.open(relay.url);
    const room = await host.create(8, "secret-client");
    const text = await scrape(relay.url);
    expect(text).not.toContain(room);
    expect(text).not.toContain("secret-client");
  });
});

describe("who is there", () => {
  test("counts members and rooms, not sockets", async () => {
    await using relay = testRelay();
    const [host, guest] = [await Client.open(relay.url), await Client.open(relay.url)];
    await Client.open(relay.url);
    await guest.join(await host.create(), "guest");
    expect(await readOne(relay, "party_sockets_clients")).toBe(2);
    expect(await readOne(relay, "party_sockets_rooms")).toBe(1);
    await guest.ask({ type: "leave" });
    expect(await readOne(relay, "party_sockets_clients")).toBe(1);
    await host.soFar();
    await host.ask({ type: "leave" });
    expect(await readOne(relay, "party_sockets_clients")).toBe(0);
    expect(await readOne(relay, "party_sockets_rooms")).toBe(0);
  });

  test("counts a lingering room, which has no member", async () => {
    await using relay = testRelay({ clock: new TestClock() });
    const host = await Client.open(relay.url);
    await host.create(8, "host", { linger: 60 });
    const witness = await Client.open(relay.url);
    await host.close();
    await witness.soFar();
    expect(await readOne(relay, "party_sockets_rooms")).toBe(1);
    expect(await readOne(relay, "party_sockets_clients")).toBe(0);
  });

  test("counts a member for its own origin and a room for its creator's", async () => {
    await using relay = testRelay();
    const host = await Client.open(relay.url, { Origin: "https://screen" });
    const guest = await Client.open(relay.url, { Origin: "https://phone" });
    await Client.open(relay.url);
    await guest.join(await host.create(), "guest");
    expect(await readMetric(relay.url, "party_sockets_clients_by_origin")).toEqual({
      "https://screen": 1,
      "https://phone": 1,
      unknown: 0,
    });
    expect(await readMetric(relay.url, "party_sockets_rooms_by_origin")).toEqual({
      "https://screen": 1,
      "https://phone": 0,
      unknown: 0,
    });
  });

  test("counts connections and created rooms for good", async () => {
    await using relay = testRelay();
    const host = await Client.open(relay.url, { Origin: "https://a" });
    for (const round of [1, 2]) {
      await host.create(8, `host ${round}`);
      await host.ask({ type: "leave" });
    }
    await (await Client.open(relay.url, { Origin: "https://a" })).close();
    expect(await readMetric(relay.url, "party_sockets_connections_total")).toEqual({ "https://a": 2 });
    expect(await readMetric(relay.url, "party_sockets_rooms_created_total")).toEqual({ "https://a": 2 });
    expect(await readMetric(relay.url, "party_sockets_rooms_by_origin")).toEqual({ "https://a": 0 });
    expect(await readOne(relay, "party_sockets_origins_tracked")).toBe(1);
  });
  test("of addresses that have gone nothing is kept", async () => {
    await using relay = testRelay({ addressHeader: "X-Forwarded-For" });
    const sets = () => {
      Bun.gc(true);
      return heapStats().objectTypeCounts.Set ?? 0; // an address's record has some
    };
    const visit = async (n: number) => {
      const client = await Client.open(relay.url, { "X-Forwarded-For": `10.0.${n >> 8}.${n & 255}` });
      if (n % 2 === 0) await client.create();
      await client.close();
    };
    for (let n = 0; n < 20; n++) await visit(n);
    const before = sets();
    for (let n = 20; n < 320; n++) await visit(n);
    await (await Client.open(relay.url)).soFar();
    expect(sets() - before).toBeLessThan(100);
  });
});

describe("origins", () => {
  const ORIGINS_SHOWN = 100; // as the specification has it, like the number below
  const ORIGINS_KEPT = 500;
  const visit = async (relay: RelayHandle, origin: string) => (await Client.open(relay.url, { Origin: origin })).close();

  test("beyond 500 are forgotten, beyond 100 shown as __other__, and no count is lost", async () => {
    await using relay = testRelay();
    for (let i = 0; i < ORIGINS_KEPT + 20; i++) await visit(relay, `https://${i}`);
    expect(await readOne(relay, "party_sockets_origins_tracked")).toBe(ORIGINS_KEPT);
    const connections = await readMetric(relay.url, "party_sockets_connections_total");
    expect(Object.keys(connections)).toHaveLength(ORIGINS_SHOWN + 1);
    expect(connections.__other__).toBe(ORIGINS_KEPT + 20 - ORIGINS_SHOWN);
  });

  test("that were used least recently are forgotten first", async () => {
    await using relay = testRelay();
    await visit(relay, "https://early");
    await visit(relay, "https://busy");
    for (let i = 2; i < ORIGINS_KEPT; i++) await visit(relay, `https://${i}`);
    for (const _ of "three visits") await visit(relay, "https://busy");
    for (const origin of ["https://one-more", "https://another"]) await visit(relay, origin);
    const connections = await readMetric(relay.url, "party_sockets_connections_total");
    expect(connections["https://busy"]).toBe(1 + "three visits".length);
    expect(Object.keys(connections)).not.toContain("https://early");
  });

  test("with members are shown before those without", async () => {
    await using relay = testRelay();
    for (let i = 0; i < ORIGINS_SHOWN; i++) {
      await visit(relay, `https://${i}`);
      await visit(relay, `https://${i}`);
    }
    const host = await Client.open(relay.url, { Origin: "https://game" });
    await host.create();
    expect(await readMetric(relay.url, "party_sockets_clients_by_origin")).toMatchObject({ "https://game": 1 });
  });

  test("never let a counter go down, however members come and go", async () => {
    await using relay = testRelay();
    for (let i = 0; i < ORIGINS_SHOWN; i++) for (const _ of "abc") await visit(relay, `https://${i}`);
    for (let i = 0; i < 30; i++) await visit(relay, `https://small-${i}`);
    const other = async () => (await readMetric(relay.url, "party_sockets_connections_total")).__other__;
    expect(await other()).toBe(30);
    const host = await Client.open(relay.url, { Origin: "https://small-0" });
    await host.create();
    expect(await other()).toBe(31);
    await host.ask({ type: "leave" });
    expect(await other()).toBe(31);
  });

  test("that look the same where they are cut stay one series, however many others come", async () => {
    await using relay = testRelay();
    const start = `https://${"x".repeat(92)}`;
    for (const end of "aaaaab") await visit(relay, start + end);
    for (let i = 0; i < ORIGINS_SHOWN; i++) for (const _ of "ab") await visit(relay, `https://${i}`);
    expect(await readMetric(relay.url, "party_sockets_connections_total")).toMatchObject({ [start]: 6, __other__: 2 });
  });

  test("that are forgotten while a member is connected are counted in __other__", async () => {
    await using relay = testRelay();
    const host = await Client.open(relay.url, { Origin: "https://game" });
    await host.create();
    for (let i = 0; i < ORIGINS_KEPT; i++) await visit(relay, `https://${i}`);
    const byOrigin = await readMetric(relay.url, "party_sockets_clients_by_origin");
    expect(counted(byOrigin)).toEqual({ __other__: 1 });
    await host.ask({ type: "leave" });
    expect(counted(await readMetric(relay.url, "party_sockets_clients_by_origin"))).toEqual({});
  });

  test("that call themselves __other__ make no second series of that name", async () => {
    await using relay = testRelay();
    await visit(relay, "__other__");
    for (let i = 0; i < ORIGINS_SHOWN + 5; i++) await visit(relay, `https://${i}`);
    const series = parseMetrics(await scrape(relay.url)).filter(
      ({ name, labels }) => name === "party_sockets_connections_total" && labels.origin === "__other__",
    );
    expect(series.map(({ value }) => value)).toEqual([1 + 5]);
  });

  const hostile = [
    'https://"quoted"',
    "https://back\\slash",
    'both\\"',
    'end of the label"} 1',
    "{instance=",
    "tab\there",
    "trailing\\",
    "\xff\xfe not UTF-8",
    "# HELP party_sockets_clients",
    "x".repeat(300), // cut at 256
  ];
  /** Its header may hold what no browser writes. */
  const visitRaw = async (relay: RelayHandle, Origin: string) => (await RawSocket.open(relay.url, "/", { Origin })).end();

  test("arrive as the client wrote them, whatever they contain", async () => {
    await using relay = testRelay();
    for (const origin of hostile) await visitRaw(relay, origin);
    const shown = Object.keys(await readMetric(relay.url, "party_sockets_connections_total"));
    expect(shown.toSorted()).toEqual(hostile.map((origin) => origin.slice(0, 100)).toSorted());
  });

  test.skipIf(Bun.which("promtool") === null)(
    "don't stop `promtool check metrics` from finding nothing wrong (needs Debian's prometheus)",
    async () => {
      await using relay = testRelay({ instance: "m1", region: "ams" });
      for (const origin of hostile) await visitRaw(relay, origin);
      const input = Buffer.from(await scrape(relay.url));
      const { exitCode, stdout, stderr } = Bun.spawnSync(["promtool", "check", "metrics"], { stdin: input });
      expect({ exitCode, says: `${stdout}${stderr}` }).toEqual({ exitCode: 0, says: "" });
    },
  );
});

describe("traffic", () => {
  test("counts frames and their bytes in, and each delivery of them out", async () => {
    await using relay = testRelay();
    const clients: Client[] = [];
    const received: string[] = [];
    const sent: string[] = [];
    const say = (client: Client, message: object) => {
      const text = JSON.stringify(message);
      sent.push(text);
      client.send(text);
    };
    for (let i = 0; i < 3; i++) clients.push(await Client.open(relay.url));
    const [host, one, two] = clients as [Client, Client, Client];
    const hear = async (client: Client, frames: number) => {
      for (let i = 0; i < frames; i++) received.push(await client.nextText());
    };
    say(host, { type: "create", clientId: "host", maxClients: 3 });
    await hear(host, 1);
    const { room } = JSON.parse(received[0] as string) as { room: string };
    say(one, { type: "join", clientId: "one", room });
    await hear(one, 1); // joined
    say(two, { type: "join", clientId: "two", room });
    await hear(two, 1); // joined
    await hear(one, 1); // peer_joined
    say(host, { type: "send", data: "to both, é is two bytes" });
    say(host, { type: "send", data: "to one", to: 1 });
    await hear(host, 2); // peer_joined, twice
    await hear(one, 2);
    await hear(two, 1);
    const bytes = (texts: string[]) => texts.reduce((sum, text) => sum + Buffer.byteLength(text), 0);
    expect(await readMetric(relay.url, "party_sockets_messages_total")).toEqual({ in: 5, out: 9 });
    expect(await readMetric(relay.url, "party_sockets_bytes_total")).toEqual({ in: bytes(sent), out: bytes(received) });
  });

  test("counts a refusal by its code", async () => {
    await using relay = testRelay();
    const client = await Client.open(relay.url);
    await client.ask("not JSON");
    await client.ask('{"type":"no such"}');
    for (const _ of "twice.") await client.ask({ type: "join", clientId: "a", room: "zzzzzz" });
    expect(counted(await readMetric(relay.url, "party_sockets_errors_total"))).toEqual({
      bad_json: 1,
      unknown_type: 1,
      room_not_found: "twice.".length,
    });
  });

  test("counts a look-up that is refused with 429", async () => {
    await using relay = testRelay({ maxMissesPerMinute: 1 });
    for (const status of [404, 429]) expect((await fetch(`${relay.url}/room/zzzzzz`)).status).toBe(status);
    expect(counted(await readMetric(relay.url, "party_sockets_errors_total"))).toEqual({ too_many_attempts: 1 });
  });

  test("counts a socket that is paused for sending too fast, once a pause", async () => {
    const clock = new TestClock();
    await using relay = testRelay({ clock, maxMessagesPerSecond: 2 });
    const client = await Client.open(relay.url);
    const burst = 4; // twice the rate
    for (let i = 0; i < burst + 1; i++) client.send({ type: "ping" });
    for (let i = 0; i < burst; i++) await client.next();
    expect(await readOne(relay, "party_sockets_paused_total")).toBe(1);
    clock.advance(10_000);
    for (let i = 0; i < burst; i++) await client.ask({ type: "ping" });
    expect(await readOne(relay, "party_sockets_paused_total")).toBe(2);
  });
  test("counts newcomers who are turned away because memory is short, so that somebody is alerted", async () => {
    const clock = new TestClock();
    let used = 0;
    await using relay = testRelay({ clock, memory: () => used, maxMemoryBytes: 100 });
    used = 200;
    clock.advance(500);
    expect((await (await Client.open(relay.url)).closed).code).toBe(1013);
    expect(await readMetric(relay.url, "party_sockets_errors_total")).toMatchObject({ capacity: 1 });
  });
});

describe("coming and going", () => {
  test("counts who takes a slot: new, again, or from an open socket", async () => {
    await using relay = testRelay();
    const host = await Client.open(relay.url);
    const room = await host.create();
    const join = async () => {
      const guest = await Client.open(relay.url);
      expect(await guest.join(room, "guest")).toMatchObject({ type: "joined", index: 1 });
      return guest;
    };
    const gone = await join();
    await host.next(); // peer_joined
    await gone.close();
    await host.next(); // peer_left
    await join();
    await join();
    expect(await readMetric(relay.url, "party_sockets_joins_total")).toEqual({ new: 1, resumed: 1, replaced: 1 }); // `created` is no join
    expect(counted(await readMetric(relay.url, "party_sockets_disconnects_total"))).toEqual({ left: 1, replaced: 1 });
  });

  test("counts members gone by reason", async () => {
    await using relay = testRelay();
    const host = await Client.open(relay.url);
    const room = await host.create();
    const guests: Client[] = [];
    for (let index = 1; index <= 5; index++) {
      const guest = await Client.open(relay.url);
      await guest.join(room, `guest ${index}`);
      await host.next(); // peer_joined
      guests.push(guest);
    }
    const [leaver, closer, lost, kicked] = guests as [Client, Client, Client, Client];
    leaver.send({ type: "leave" });
    await host.next(); // peer_left, as below
    await closer.close();
    await host.next();
    lost.terminate();
    await host.next();
    host.send({ type: "kick", index: 4 });
    await kicked.closed;
    expect(counted(await readMetric(relay.url, "party_sockets_disconnects_total"))).toEqual({
      left: 2,
      lost: 1,
      kicked: 1,
    });
    host.send({ type: "close_room" });
    await host.closed;
    expect(counted(await readMetric(relay.url, "party_sockets_disconnects_total"))).toEqual({
      left: 2,
      lost: 1,
      kicked: 1,
      room_closed: 2,
    });
  });

  test("counts a member as lost, not slow, that came after much was said and vanishes", async () => {
    await using relay = testRelay({ maxBufferedBytes: 100_000, maxMessageBytes: 25_000 });
    const host = await Client.open(relay.url);
    const room = await host.create();
    const early = await Client.open(relay.url);
    await early.join(room, "early");
    for (let i = 0; i < 6; i++) {
      host.send({ type: "send", data: "x".repeat(20_000) });
      expect(await early.next()).toMatchObject({ from: 0 });
    }
    const late = await Client.open(relay.url);
    await late.join(room, "late");
    await early.next(); // peer_joined
    late.terminate();
    expect(await early.next()).toMatchObject({ type: "peer_left" });
    expect(counted(await readMetric(relay.url, "party_sockets_disconnects_total"))).toEqual({ lost: 1 });
  });

  test("counts a member that reads nothing and is cut as slow", async () => {
    await using relay = testRelay();
    const host = await Client.open(relay.url);
    const room = await host.create();
    const slow = await RawSocket.open(relay.url);
    slow.send({ type: "join", clientId: "slow", room });
    await host.next(); // peer_joined
    slow.pause();
    const drawing = "x".repeat(200 * 1024);
    const left = host.next();
    let isLeft = false;
    void left.then(() => (isLeft = true));
    const pinger = await Client.open(relay.url);
    while (!isLeft) {
      host.send({ type: "send", data: drawing });
      await pinger.soFar(); // one frame at a time, so that this process isn't the one that falls behind
    }
    expect(await left).toEqual({ type: "peer_left", index: 1 });
    expect(counted(await readMetric(relay.url, "party_sockets_disconnects_total"))).toEqual({ slow: 1 });
    slow.end();
  });

  test("counts members whose rooms a drain closes, and says that it drains", async () => {
    const clock = new TestClock();
    await using relay = testRelay({ clock, drainSeconds: 8 });
    const hosts = [await Client.open(relay.url), await Client.open(relay.url)] as const;
    for (const host of hosts) await host.create();
    expect(await readOne(relay, "party_sockets_draining")).toBe(0);
    void relay.drain();
    expect(await readOne(relay, "party_sockets_draining")).toBe(1);
    clock.advance(6_500); // rooms are closed from 4 s to 8 s, so one of the two by now
    expect(await hosts[0].closed).toMatchObject({ code: 1012 });
    expect(counted(await readMetric(relay.url, "party_sockets_disconnects_total"))).toEqual({ shutdown: 1 });
    expect(await readOne(relay, "party_sockets_clients")).toBe(1);
  });
});

describe("routing", () => {
  const onFly = (siblings: Siblings): Partial<Config> => ({
    cluster: flyCluster("ams", siblings),
    instance: "me",
    region: "ams",
  });
  const amsCode = "111111"; // the lowest code is the first region's
  const otherRegionsCode = "zzzzzz".replace(/^z/, "2"); // 58^5 and more: not the first region's

  test("counts a replay by where it went, and one that came back", async () => {
    await using relay = testRelay(onFly({ list: async () => ["sibling"], has: async () => true }));
    const get = async (path: string, headers: Record<string, string> = {}) =>
      (await fetch(relay.url + path, { headers, redirect: "manual" })).status;
    expect(await get("/?instance=other")).toBe(409);
    expect(await get(`/room/${otherRegionsCode}`)).toBe(409);
    expect(await get(`/room/${amsCode}`)).toBe(409);
    expect(await get("/?instance=gone", { "fly-replay-src": "instance=a" })).toBe(302);
    expect(await get(`/room/${otherRegionsCode}`, { "fly-replay-failed": "reason=timeout" })).toBe(404);
    expect(await readMetric(relay.url, "party_sockets_replays_total")).toEqual({
      instance: 1,
      region: 1,
      sibling: 1,
      stale: 1,
      failed: 1,
    });
  });

  test("counts the siblings asked by what they answered", async () => {
    const answers: Record<string, () => boolean> = {
      empty: () => false,
      dead: () => {
        throw new Error("no route");
      },
    };
    await using relay = testRelay(onFly({ list: async () => Object.keys(answers), has: async (id) => answers[id]?.() ?? false }));
    expect((await fetch(`${relay.url}/room/${amsCode}`)).status).toBe(404);
    expect(await readMetric(relay.url, "party_sockets_probes_total")).toEqual({ found: 0, missing: 1, failed: 1 });
    answers.dead = () => true;
    expect((await fetch(`${relay.url}/room/${amsCode}`, { redirect: "manual" })).status).toBe(409);
    expect(await readMetric(relay.url, "party_sockets_probes_total")).toMatchObject({ found: 1, failed: 1 });
  });
});

describe("health", () => {
  test("shows the worst delay of a timer for 15 s", async () => {
    const clock = new TestClock();
    let late = 0;
    const lateClock = {
      now: () => clock.now() + late,
      epoch: () => clock.epoch(),
      after: (ms: number, run: () => void) => clock.after(ms, run),
      rest: () => {},
    };
    await using relay = testRelay({ clock: lateClock });
    const lag = () => readOne(relay, "party_sockets_event_loop_lag_seconds");
    clock.advance(5_000);
    expect(await lag()).toBe(0);
    late = 300; // one timer is late; those after it are on time again
    clock.advance(14_900);
    expect(await lag()).toBe(0.3);
    clock.advance(1_000);
    expect(await lag()).toBe(0);
  });

  test("shows memory in bytes and uptime in seconds", async () => {
    const clock = new TestClock();
    await using relay = testRelay({ clock });
    clock.advance(90_000);
    expect(await readOne(relay, "process_uptime_seconds")).toBe(90);
    const resident = (await readOne(relay, "process_resident_memory_bytes")) as number;
    const heap = (await readOne(relay, "process_heap_used_bytes")) as number;
    expect(resident / process.memoryUsage.rss()).toBeWithin(0.5, 2);
    expect(heap).toBeWithin(100_000, resident);
  });
});
