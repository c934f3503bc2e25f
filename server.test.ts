import { describe, expect, spyOn, test } from "bun:test";
import { Client } from "./ops/shared/client.ts";
import { readMetric } from "./ops/shared/metrics.ts";
import { Random } from "./ops/shared/random.ts";
import { TestClock, testRelay } from "./ops/shared/relay.ts";
import { handshake, RawSocket } from "./ops/shared/sockets.ts";
import { until } from "./ops/shared/wait.ts";
import { encodeCode, newCode, regionOf, REGIONS } from "./regions.ts";
import type { ClientMessage, Config, Incoming, Route, Siblings } from "./server.ts";
import {
  addressKey,
  configFromEnv,
  ConfigError,
  flyCluster,
  isJson,
  nginxCluster,
  parseMachines,
  route,
  startRelay,
  systemClock,
  VERSION,
} from "./server.ts";

/** A wait ends before the test's own 5 s, so that it says what it waited for. */
const SOON_MS = 4_000;

/** A relay with a room of which `host` is the creator and `guests` the others, all greetings read. */
async function party(guests: number, overrides: Partial<Config> = {}, options: object = {}) {
  const relay = testRelay(overrides);
  const open = () => Client.open(relay.url);
  const host = await open();
  const room = await host.create(8, "host", options);
  const others: Client[] = [];
  for (let i = 1; i <= guests; i++) {
    const guest = await open();
    await guest.join(room, `guest-${i}`);
    for (const other of [host, ...others]) await other.next();
    others.push(guest);
  }
  const [guest, second] = others as [Client, Client];
  const get = (path: string, init?: RequestInit) => fetch(relay.url + path, { redirect: "manual", ...init });
  return {
    relay,
    open,
    host,
    guest,
    second,
    room,
    get,
    [Symbol.asyncDispose]: () => relay[Symbol.asyncDispose](),
  };
}

const error = (message: string, code: string) => ({ type: "error", message, code }) as Record<string, unknown> & { type: string };
const deep = (levels: number) => "[".repeat(levels) + "]".repeat(levels);
/** A message that isn't well-formed, for the type checker's eyes. */
const odd = (message: object) => message as unknown as ClientMessage;

describe("create", () => {
  test("gives a code, the machine's labels and slot 0", async () => {
    await using relay = testRelay({ instance: "m1", region: "fra" });
    const host = await Client.open(relay.url);
    const created = await host.ask({ type: "create", clientId: "a", maxClients: 2 });
    expect(created).toEqual({
      type: "created",
      room: expect.stringMatching(/^[1-9A-HJ-NP-Za-km-z]{6}$/),
      instance: "m1",
      region: "fra",
      index: 0,
    });
  });

  test("says empty labels if none are set", async () => {
    await using relay = testRelay();
    const host = await Client.open(relay.url);
    expect(await host.ask({ type: "create", clientId: "a", maxClients: 2 })).toMatchObject({
      instance: "",
      region: "",
    });
  });

  const refused: [string, object, string][] = [
    ["no clientId", { maxClients: 2 }, "clientId is required"],
    ["an empty clientId", { clientId: "", maxClients: 2 }, "clientId is required"],
    ["a clientId that is a number", { clientId: 7, maxClients: 2 }, "clientId is required"],
    ["a clientId of 129 characters", { clientId: "x".repeat(129), maxClients: 2 }, "clientId is too long"],
    ["a clientId of 60,000 characters", { clientId: "x".repeat(60_000), maxClients: 2 }, "clientId is too long"],
    ["no maxClients", { clientId: "a" }, "maxClients must be a positive number"],
    ["maxClients 0", { clientId: "a", maxClients: 0 }, "maxClients must be a positive number"],
    ["maxClients -1", { clientId: "a", maxClients: -1 }, "maxClients must be a positive number"],
    ["maxClients 2.5", { clientId: "a", maxClients: 2.5 }, "maxClients must be a positive number"],
    ['maxClients "4"', { clientId: "a", maxClients: "4" }, "maxClients must be a positive number"],
    ["maxClients true", { clientId: "a", maxClients: true }, "maxClients must be a positive number"],
    ["maxClients null", { clientId: "a", maxClients: null }, "maxClients must be a positive number"],
    ["maxClients 1001", { clientId: "a", maxClients: 1001 }, "maxClients must be at most 1000"],
    ["linger 301", { clientId: "a", maxClients: 2, linger: 301 }, "linger must be a whole number from 0 to 300"],
    ["linger null", { clientId: "a", maxClients: 2, linger: null }, "linger must be a whole number from 0 to 300"],
    ["linger -1", { clientId: "a", maxClients: 2, linger: -1 }, "linger must be a whole number from 0 to 300"],
    ["hostGrace -1", { clientId: "a", maxClients: 2, hostGrace: -1 }, "hostGrace must be a whole number from 0 to 3600"],
    ["hostGrace 1.5", { clientId: "a", maxClients: 2, hostGrace: 1.5 }, "hostGrace must be a whole number from 0 to 3600"],
    ["migrate 1", { clientId: "a", maxClients: 2, hostGrace: 1, migrate: 1 }, "migrate must be true or false"],
    ["migrate with no grace", { clientId: "a", maxClients: 2, hostGrace: 0, migrate: true }, "migrate needs hostGrace"],
    ["migrate alone", { clientId: "a", maxClients: 2, migrate: true }, "migrate needs hostGrace"],
  ];
  for (const [what, fields, message] of refused) {
    test(`refuses ${what}`, async () => {
      await using relay = testRelay();
      const client = await Client.open(relay.url);
      expect(await client.ask(odd({ type: "create", ...fields }))).toEqual(error(message, "bad_request"));
      expect(await client.create()).toHaveLength(6); // the socket stays usable
    });
  }

  test("refuses maxClients of 1e999", async () => {
    await using relay = testRelay();
    const client = await Client.open(relay.url);
    expect(await client.ask('{"type":"create","clientId":"a","maxClients":1e999}')).toEqual(
      error("maxClients must be a positive number", "bad_request"),
    );
  });

  test("refuses a second room, and fields before that", async () => {
    await using p = await party(0);
    expect(await p.host.ask({ type: "create", clientId: "a", maxClients: 2 })).toEqual(
      error("Already in a room", "already_in_room"),
    );
    expect(await p.host.ask({ type: "create", clientId: "a", maxClients: 0 })).toMatchObject({
      code: "bad_request",
    });
  });

  test("takes a clientId of 128 characters and any JSON string as one", async () => {
    await using relay = testRelay();
    for (const clientId of ["x".repeat(128), "__proto__", "constructor", "\ud800", "\u0000"]) {
      const client = await Client.open(relay.url);
      const room = await client.create(2, clientId);
      await client.close();
      expect(room).toHaveLength(6);
    }
  });

  describe("url", () => {
    const make = async (url: unknown) => {
      await using relay = testRelay({ instance: "m 1" });
      const client = await Client.open(relay.url);
      return await client.ask(odd({ type: "create", clientId: "a", maxClients: 2, url }));
    };
    test("is given filled in and normalized in created, joined and /room/:code", async () => {
      await using p = await party(0, { instance: "m1" }, { url: "HTTPS://Play.example/../{room}?i={instance}" });
      const url = `https://play.example/${p.room}?i=m1`;
      expect(await (await p.open()).join(p.room, "b")).toMatchObject({ url });
      expect(await (await p.get(`/room/${p.room}`)).json()).toMatchObject({ url });
    });
    test("is in created, or refused, whatever the code is that stands in its host's name", async () => {
      await using relay = testRelay({ maxMessagesPerSecond: 0 });
      const client = await Client.open(relay.url);
      const answers: unknown[] = [];
      for (let i = 0; i < 100; i++) {
        const { room, type, message, url } = await client.ask({
          ...{ type: "create", clientId: "a", maxClients: 2 },
          url: "https://%4{room}.example/", // an escape if the code begins with a hexadecimal digit
        });
        answers.push(type);
        if (type === "error") expect(message).toStartWith("url must be");
        else
          expect(url).toBe(`https://${String.fromCharCode(parseInt(`4${room[0]}`, 16))}${room.slice(1)}.example/`.toLowerCase());
        if (type === "created") await client.ask({ type: "leave" });
      }
      expect(new Set(answers)).toEqual(new Set(["created", "error"]));
    });
    test("is filled in percent-encoded", async () => {
      expect(await make("https://x.io/?i={instance}")).toMatchObject({ url: "https://x.io/?i=m%201" });
    });
    for (const url of [
      "http://x.io/{room}",
      "javascript:alert(1)",
      "/{room}",
      "https://x.io/{code}",
      "https://x.io/{",
      "",
      "https://",
      `https://x.io/${"é".repeat(250)}`,
      5,
      null,
      ["https://x.io"],
    ])
      test(`refuses ${JSON.stringify(url).slice(0, 40)}`, async () => {
        expect(await make(url)).toEqual({
          type: "error",
          code: "bad_request",
          message: expect.stringMatching(/^url/),
        });
      });
  });
});

describe("join", () => {
  test("gives slot and peers, and tells the others", async () => {
    await using p = await party(2);
    const third = await p.open();
    expect(await third.join(p.room, "c")).toEqual({
      type: "joined",
      room: p.room,
      index: 3,
      peers: [0, 1, 2],
    });
    for (const other of [p.host, p.guest, p.second]) expect(await other.next()).toEqual({ type: "peer_joined", index: 3 });
  });

  test("is told Room not found for an unknown code, and a code in the wrong case", async () => {
    await using p = await party(0);
    const guest = await p.open();
    const swapped = p.room.replace(/[a-zA-Z]/, (c) => (c === c.toLowerCase() ? c.toUpperCase() : c.toLowerCase()));
    for (const room of ["zzzzzz", "__proto__", "constructor", "x".repeat(10_000), ...(swapped === p.room ? [] : [swapped])])
      expect(await guest.join(room, "b")).toEqual(error("Room not found", "room_not_found"));
  });

  for (const room of [undefined, "", 5, null, {}, { toString: 1 }, ["a"]])
    test(`refuses ${JSON.stringify(room)} as a room`, async () => {
      await using p = await party(0);
      const guest = await p.open();
      expect(await guest.ask(odd({ type: "join", clientId: "b", room }))).toEqual(error("room is required", "bad_request"));
    });

  test("refuses the one too many, and takes it once a place is free", async () => {
    await using relay = testRelay();
    const host = await Client.open(relay.url);
    const guest = await Client.open(relay.url);
    const late = await Client.open(relay.url);
    const room = await host.create(2);
    await guest.join(room, "b");
    expect(await late.join(room, "c")).toEqual(error("Room is full", "room_full"));
    await guest.close();
    expect(await late.join(room, "c")).toEqual({ type: "joined", room, index: 2, peers: [0] });
  });

  test("never hands an index out twice", async () => {
    await using p = await party(0);
    for (let i = 1; i <= 20; i++) {
      const guest = await p.open();
      expect(await guest.join(p.room, `g${i}`)).toMatchObject({ index: i });
      await guest.close();
    }
  });

  test("gives the same slot to the same clientId, closes the old socket with 4000, and peers see nothing", async () => {
    await using p = await party(2);
    const again = await p.open();
    expect(await again.join(p.room, "guest-1")).toEqual({
      type: "joined",
      room: p.room,
      index: 1,
      peers: [0, 2],
    });
    expect(await p.guest.closed).toEqual({ code: 4000, reason: "replaced" });
    expect(await p.host.soFar()).toEqual([]);
    expect(await p.second.soFar()).toEqual([]);
    again.send({ type: "send", data: 1 });
    expect(await p.host.next()).toEqual({ type: "message", from: 1, data: 1 });
  });

  test("gives a vacant slot back to its clientId, the host's too", async () => {
    await using p = await party(1);
    await p.host.close();
    expect(await p.guest.next()).toEqual({ type: "peer_left", index: 0 });
    const again = await p.open();
    expect(await again.join(p.room, "host")).toEqual({
      type: "joined",
      room: p.room,
      index: 0,
      peers: [1],
      resumed: true,
    });
    expect(await p.guest.next()).toEqual({ type: "peer_joined", index: 0, resumed: true });
  });

  test("replaces in a full room, but resumes only if there is a place", async () => {
    await using relay = testRelay();
    const [host, guest, other] = [await Client.open(relay.url), await Client.open(relay.url), await Client.open(relay.url)];
    const room = await host.create(2);
    await guest.join(room, "b");
    const again = await Client.open(relay.url);
    expect(await again.join(room, "b")).toMatchObject({ type: "joined", index: 1 });
    await again.close();
    await other.join(room, "c");
    expect(await (await Client.open(relay.url)).join(room, "b")).toEqual(error("Room is full", "room_full"));
  });

  test("keeps apart clientIds that differ in lone surrogates only", async () => {
    await using p = await party(0);
    expect(await (await p.open()).join(p.room, "\ud800")).toMatchObject({ index: 1 });
    expect(await (await p.open()).join(p.room, "\ud801")).toMatchObject({ index: 2 });
  });

  test("refuses a socket that is in a room", async () => {
    await using p = await party(1);
    expect(await p.guest.join(p.room, "guest-1")).toEqual(error("Already in a room", "already_in_room"));
  });

  test("shows nothing from before, not even what was sent in the same moment", async () => {
    await using p = await party(1);
    const late = await p.open();
    for (let i = 0; i < 50; i++) p.host.send({ type: "send", data: i });
    const joined = await late.join(p.room, "late");
    expect(joined.type).toBe("joined");
    const frames = [...(await p.guest.soFar()), ...(await late.soFar())];
    const seenByLate = frames.filter((f) => f.type === "message").length;
    expect(seenByLate).toBeGreaterThanOrEqual(50); // the guest saw all of them, `late` only those after its joined
  });

  test("costs the same however long a room's history is", async () => {
    await using p = await party(0, { maxMessagesPerSecond: 0 });
    const guest = await p.open();
    for (let i = 0; i < 3000; i++) {
      guest.send({ type: "join", clientId: `fresh-${i}`, room: p.room });
      guest.send({ type: "leave" });
      if (i % 150 === 149) await guest.soFar().then((frames) => expect(frames).toHaveLength(300));
    }
    await p.host.soFar();
    // The 1,000 that went last are remembered; whoever went before them is a stranger.
    expect(await guest.join(p.room, "fresh-2000")).toMatchObject({ index: 2001, resumed: true });
    await guest.ask({ type: "leave" });
    expect(await guest.join(p.room, "fresh-1000")).toMatchObject({ index: 3001 });
  }, 20_000);
});

describe("send", () => {
  test("reaches everyone but the sender", async () => {
    await using p = await party(2);
    p.guest.send({ type: "send", data: { hi: 1 } });
    for (const other of [p.host, p.second]) expect(await other.next()).toEqual({ type: "message", from: 1, data: { hi: 1 } });
    expect(await p.guest.soFar()).toEqual([]);
  });

  test("with `to` reaches only that slot; one's own index is a target like another", async () => {
    await using p = await party(2);
    p.host.send({ type: "send", data: "a", to: 2 });
    p.host.send({ type: "send", data: "b", to: 0 });
    expect(await p.host.soFar()).toEqual([{ type: "message", from: 0, data: "b" }]);
    expect(await p.second.soFar()).toEqual([{ type: "message", from: 0, data: "a" }]);
    expect(await p.guest.soFar()).toEqual([]);
  });

  for (const to of [7, -1, 1.5, "1", null, true, {}, 1e300, []])
    test(`is told Target peer not found for to: ${JSON.stringify(to)}`, async () => {
      await using p = await party(1);
      expect(await p.host.ask(odd({ type: "send", data: 1, to }))).toEqual(error("Target peer not found", "peer_not_found"));
      expect(await p.guest.soFar()).toEqual([]);
    });

  test("to a slot that is only away is told peer_away, with the older message; in a list it is just missing", async () => {
    await using p = await party(2);
    await p.guest.close();
    await p.host.next();
    expect(await p.host.ask({ type: "send", data: 1, to: 1 })).toEqual(error("Target peer not found", "peer_away"));
    expect(await p.host.ask({ type: "send", data: 1, to: [1] })).toEqual({
      ...error("Target peer not found", "peer_not_found"),
      missing: [1],
    });
    p.host.send({ type: "kick", index: 1 });
    expect(await p.host.ask({ type: "send", data: 1, to: 1 })).toMatchObject({ code: "peer_not_found" });
    expect(await p.host.ask({ type: "send", data: 1, to: 7 })).toMatchObject({ code: "peer_not_found" });
  });

  test("to several reaches the connected ones once, and names the missing ascending", async () => {
    await using p = await party(2);
    expect(await p.host.ask({ type: "send", data: 1, to: [9, 2, 5, 1, 2, 9] })).toEqual({
      ...error("Target peer not found", "peer_not_found"),
      missing: [5, 9],
    });
    expect(await p.guest.soFar()).toEqual([{ type: "message", from: 0, data: 1 }]);
    expect(await p.second.soFar()).toEqual([{ type: "message", from: 0, data: 1 }]);
  });

  test("to several is refused whole if one is no index or there are more than 64", async () => {
    await using p = await party(1);
    for (const to of [[1, "1"], [1, null], [1, -1], Array.from({ length: 65 }, (_, i) => i)])
      expect(await p.host.ask(odd({ type: "send", data: 1, to }))).toEqual(error("Target peer not found", "peer_not_found"));
    expect(await p.guest.soFar()).toEqual([]);
    p.host.send({ type: "send", data: 2, to: Array(500).fill(1) as number[] });
    expect(await p.guest.soFar()).toEqual([{ type: "message", from: 0, data: 2 }]);
  });

  test("with echo: true reaches the sender too; any other echo, or one with `to`, is ignored", async () => {
    await using p = await party(1);
    p.guest.send({ type: "send", data: 1, echo: true });
    p.guest.send(odd({ type: "send", data: 2, echo: "yes" }));
    p.guest.send({ type: "send", data: 3, echo: true, to: 0 });
    expect(await p.guest.soFar()).toEqual([{ type: "message", from: 1, data: 1 }]);
    expect((await p.host.soFar()).map((f) => f.data)).toEqual([1, 2, 3]);
  });

  test("takes null as data, and refuses none; membership is asked first", async () => {
    await using p = await party(1);
    p.host.send({ type: "send", data: null });
    expect(await p.guest.nextText()).toBe('{"type":"message","from":0,"data":null}');
    expect(await p.host.ask(odd({ type: "send" }))).toEqual(error("data is required", "bad_request"));
    expect(await p.host.ask(odd({ type: "send", to: 99 }))).toEqual(error("data is required", "bad_request"));
    expect(await (await p.open()).ask(odd({ type: "send" }))).toEqual(error("Not in a room", "not_in_room"));
  });

  describe("keeps the text of data", () => {
    const values = [
      "0",
      "-0",
      "1e400",
      "9007199254740993",
      "1.0",
      "1E+2",
      "true",
      "null",
      '""',
      '"a\\u0041\\/\\n"',
      '"\\ud800"',
      '"é😀"',
      '"\u2028"',
      "[]",
      "[ 1 ,\t2 ]",
      "{}",
      '{ "b":1,"a" : 2,"b":3 }',
      '{"__proto__":{"x":1}}',
      '"],\\"to\\":0}"',
      '{"type":"x","from":9,"data":1,"to":0}',
      '",\\"to\\":1}"',
      "[[[1]]]",
      '"\\\\"',
      '"\\\\\\""',
      '"}"',
      "12345678901234567890",
      deep(1000),
    ];
    const spellings: [string, (data: string) => string][] = [
      ["plain", (d) => `{"type":"send","data":${d}}`],
      ["spaced", (d) => ` \n{ "type" : "send" ,\r\n\t"data" : ${d} \t}\n `],
      ["data first", (d) => `{"data":${d},"type":"send"}`],
      ["to before", (d) => `{"type":"send","to":1,"data":${d}}`],
      ["to after", (d) => `{"type":"send","data":${d},"to":1}`],
      ["to after, spaced", (d) => `{"type":"send","data":${d} , "to" : 1 }`],
      ["to after much space", (d) => `{"type":"send","data":${d}${" ".repeat(40)},"to":1}`],
      ["to after a comma and much space", (d) => `{"type":"send","data":${d} ,${"\t".repeat(40)}"to" : 1}`],
      ["to as 1.0", (d) => `{"type":"send","data":${d},"to":1.0}`],
      ["to first", (d) => `{"to":1,"data":${d},"type":"send"}`],
      ["more members", (d) => `{"x":[1,{"data":5}],"type":"send","data":${d},"y":"data"}`],
      ["escaped names", (d) => `{"\\u0074ype":"send","d\\u0061ta":${d}}`],
      ["escaped type", (d) => `{"type":"s\\u0065nd","data":${d}}`],
      ["repeated data", (d) => `{"type":"send","data":"first","data":${d}}`],
      ["repeated, the last escaped", (d) => `{"data":[1],"type":"send","\\u0064ata":${d}}`],
      ["repeated type", (d) => `{"type":"ping","data":${d},"type":"send"}`],
      ["with echo", (d) => `{"type":"send","data":${d},"echo":false}`],
      ["repeated to", (d) => `{"type":"send","to":9,"data":${d},"to":1}`],
    ];
    for (const [name, spell] of spellings)
      test(`spelled ${name}`, async () => {
        await using p = await party(1);
        for (const data of values) {
          p.host.send(spell(data));
          expect(await p.guest.nextText()).toBe(`{"type":"message","from":0,"data":${data}}`);
        }
      });

    test("in a frame of 200 KB of escapes, on both ways", async () => {
      await using p = await party(1);
      const data = `"${'\\"\\\\\\u0041'.repeat(20_000)}"`;
      p.host.send(`{"type":"send","data":${data}}`);
      expect(await p.guest.nextText()).toBe(`{"type":"message","from":0,"data":${data}}`);
      p.host.send(`{"data":${data},"type":"send"}`);
      expect(await p.guest.nextText()).toBe(`{"type":"message","from":0,"data":${data}}`);
    });
  });

  test("can't be forged: what isn't one JSON value in `data` is no message", async () => {
    await using p = await party(1);
    for (const data of [
      '1},{"from":9',
      '1,"from":9,"x":',
      "1}",
      '"a" "b"',
      "01",
      "+1",
      ".5",
      "1.",
      "'a'",
      "[1,]",
      "{a:1}",
      "NaN",
      "undefined",
      '"\t"',
      '"\\x41"',
      "",
      "tru",
      '1,"to":01',
      '{"a":1',
    ])
      expect(await p.host.ask(`{"type":"send","data":${data}}`)).toEqual(error("Invalid JSON", "bad_json"));
    expect(await p.guest.soFar()).toEqual([]);
    p.host.send('{"type":"send","data":1,"from":9,"type":"send"}');
    expect(await p.guest.nextText()).toBe('{"type":"message","from":0,"data":1}');
  });

  test("with a long string is no message if the string isn't JSON", async () => {
    await using p = await party(1);
    const long = "x".repeat(5000);
    for (const data of [`"${long}\n"`, `"${long}\u0000${long}"`, `"${long}\\x"`, `"${long}" "${long}"`, `"${long}`, `${long}"`])
      expect(await p.host.ask(`{"type":"send","data":${data}}`)).toMatchObject({ code: "bad_json" });
    for (const data of [`"${long}"`, `"${long}é\u2028\u007f"`, `"${long}\\u0041\\""`]) {
      p.host.send(`{"type":"send","data":${data}}`);
      expect(await p.guest.nextText()).toBe(`{"type":"message","from":0,"data":${data}}`);
    }
  });

  test("arrives even if the sender goes in the same moment", async () => {
    await using p = await party(1);
    for (let i = 0; i < 100; i++) p.guest.send({ type: "send", data: i });
    void p.guest.close();
    for (let i = 0; i < 100; i++) expect(await p.host.next()).toEqual({ type: "message", from: 1, data: i });
    expect(await p.host.next()).toEqual({ type: "peer_left", index: 1 });
  });
  test("to 64 slots is the most that is taken", async () => {
    await using p = await party(1);
    const to = Array.from({ length: 64 }, (_, i) => i + 1);
    expect(await p.host.ask({ type: "send", data: 1, to })).toMatchObject({ missing: to.slice(1) });
    expect(await p.guest.soFar()).toEqual([{ type: "message", from: 0, data: 1 }]);
  });
});

function parses(text: string): boolean {
  try {
    JSON.parse(text);
    return true;
  } catch {
    return false;
  }
}

test("100,000 texts with a long run in them are JSON if the engine's parser says so", () => {
  const dice = new Random(1);
  const RUN = "plain text, as it stands in a drawing. ".repeat(40);
  const PIECES = ['"', '"', '"', "\\", '\\"', "\\\\", "\\n", "\\u00e9", "\\x", "\n", "\x7f", "\u2028", "\ud800", "é", "😀", "ab"];
  const AROUND = ["{", "}", "[", "]", ":", ",", '"a"', '""', "1", "-", "true", "nul", " ", "\t"];
  const NUMBERS = Array.from({ length: 700 }, (_, n) => n % 10).join();
  const wholes = [
    (text: string) => text,
    (text: string) => `{"a":${text}}`,
    (text: string) => `[1,${text},{"b":null}]`,
    (text: string) => `{"points":[${NUMBERS}],"text":${text}}`,
  ];
  const some = (most: number, pieces: string[]) => Array.from({ length: dice.below(most) }, () => dice.pick(pieces)).join("");
  const counts = { valid: 0, invalid: 0 };
  for (let i = 0; i < 100_000; i++) {
    const run = dice.chance(0.9) ? RUN : Array.from({ length: 300 }, (_, n) => n).join(",");
    const contents = dice.chance(0.3) ? run : some(3, PIECES) + run + some(3, PIECES);
    const text = some(3, dice.chance(0.5) ? [""] : AROUND) + dice.pick(wholes)(`"${contents}"`) + some(2, AROUND);
    const isValid = parses(text);
    counts[isValid ? "valid" : "invalid"]++;
    if (isJson(text) !== isValid) expect.unreachable(`isJson says ${!isValid} of ${text.replaceAll(RUN, "…")}`);
  }
  expect(counts.valid).toBeGreaterThan(10_000);
  expect(counts.invalid).toBeGreaterThan(10_000);
});

test("100,000 short texts, most of them JSON with a character or two changed, are JSON if the engine's parser says so", () => {
  const dice = new Random(2);
  const NUMBERS = ["0", "-0", "7", "-12.50", "0.5", "1e5", "2E-3", "-", "01", "1.", ".5", "+1", "9007199254740993", "NaN"];
  const STRINGS = [
    '""',
    '"a"',
    '"é😀"',
    '"\ud800"',
    '"a\\"b"',
    '"\\u00e9"',
    '"\\x"',
    '"\n"',
    '"}"',
    '"],"',
    ...[62, 63, 64, 65].flatMap((length) => [`"${"x".repeat(length)}"`, `"${"x".repeat(length)}\\"`]),
  ];
  const WORDS = ["true", "false", "null", "nul", "True", "undefined"];
  const CHANGES = [...'{}[]:,"\\0-.e \n', "true", '"a":', ""];
  const value = (levels: number): string => {
    const kind = dice.below(levels > 0 ? 6 : 3);
    if (kind === 0) return dice.pick(NUMBERS);
    if (kind === 1) return dice.pick(STRINGS);
    if (kind === 2) return dice.pick(WORDS);
    const values = Array.from({ length: dice.below(4) }, () => value(levels - 1));
    return kind === 3 ? `[${values}]` : `{${values.map((each) => `${dice.pick(STRINGS)}:${each}`)}}`;
  };
  const counts = { valid: 0, invalid: 0 };
  for (let i = 0; i < 100_000; i++) {
    let text = value(4);
    if (dice.chance(0.05)) text = "[".repeat(dice.below(40)) + text + "]".repeat(dice.below(40));
    for (let changes = dice.below(3); changes > 0; changes--) {
      const at = dice.below(text.length + 1);
      text = text.slice(0, at) + dice.pick(CHANGES) + text.slice(at + dice.below(2));
    }
    const isValid = parses(text);
    counts[isValid ? "valid" : "invalid"]++;
    const [before, after] = [dice.pick(CHANGES), dice.pick(CHANGES)];
    if (isJson(before + text + after, before.length, before.length + text.length) !== isValid)
      expect.unreachable(`isJson says ${!isValid} of ${text} between ${before} and ${after}`);
  }
  expect(counts.valid).toBeGreaterThan(10_000);
  expect(counts.invalid).toBeGreaterThan(10_000);
  for (let levels = 1; levels < 100; levels++) {
    expect(isJson(`${"[".repeat(levels)}{"a":1}${"]".repeat(levels)}`)).toBe(true);
    expect(isJson(`${"[".repeat(levels)}{"a":1`)).toBe(false);
  }
});

describe("a socket that closes", () => {
  test("shows the others peer_left at once, and frees its place and the room when it was the last", async () => {
    await using p = await party(1);
    p.guest.terminate();
    expect(await p.host.next()).toEqual({ type: "peer_left", index: 1 });
    expect(await (await p.get(`/room/${p.room}`)).json()).toMatchObject({ clients: 1 });
    await p.host.close();
    const late = await p.open();
    expect(await late.join(p.room, "host")).toEqual(error("Room not found", "room_not_found"));
    expect(await (await p.get("/")).text()).toBe("rooms: 0\nclients: 0\n");
  });
});

describe("bad frames", () => {
  const frames: [string, string | Uint8Array<ArrayBuffer>, string][] = [
    ["nothing", "", "bad_json"],
    ["null", "null", "bad_json"],
    ["a number", "42", "bad_json"],
    ["a string", '"create"', "bad_json"],
    ["an array", '[{"type":"create"}]', "bad_json"],
    ["half an object", '{"type":"create"', "bad_json"],
    ["a byte order mark", "\ufeff{}", "bad_json"],
    ["100,000 nested brackets", deep(50_000), "bad_json"],
    ["130,000 open brackets", "[".repeat(130_000), "bad_json"],
    ["bytes", new TextEncoder().encode('{"type":"create"}'), "bad_json"],
    ["no bytes", new Uint8Array(0), "bad_json"],
    ["no type", "{}", "unknown_type"],
    ["type __proto__", '{"type":"__proto__"}', "unknown_type"],
    ["type constructor", '{"type":"constructor"}', "unknown_type"],
    ["type toString", '{"type":"toString"}', "unknown_type"],
    ["a type that is a number", '{"type":5}', "unknown_type"],
    ["a type that is an object", '{"type":{"toString":"send"}}', "unknown_type"],
    ["100,000 nested brackets in a message", `{"type":"nope","x":${deep(100_000)}}`, "unknown_type"],
  ];
  for (const [what, frame, code] of frames)
    test(`${what}: an answer with ${code}, and the socket and its room go on`, async () => {
      await using p = await party(1);
      expect(await p.guest.ask(frame)).toMatchObject({ type: "error", code });
      p.guest.send({ type: "send", data: "still here" });
      expect(await p.host.next()).toMatchObject({ data: "still here" });
      expect(await (await p.open()).ask(frame)).toMatchObject({ type: "error", code });
    });

  test("a message nested 100,000 deep is forwarded as it is", async () => {
    await using p = await party(1);
    p.host.send(`{"type":"send","data":${deep(100_000)}}`);
    expect((await p.guest.nextText()).length).toBe(200_000 + '{"type":"message","from":0,"data":}'.length);
    p.host.send(`{"data":${deep(100_000)},"type":"send"}`);
    expect((await p.guest.nextText()).length).toBe(200_000 + '{"type":"message","from":0,"data":}'.length);
  });

  test("a frame at the limit is taken; one over it closes its socket with 1009 and nobody else's", async () => {
    await using p = await party(2, { maxMessageBytes: 1000 });
    const frame = (bytes: number) => `{"type":"send","data":"${"x".repeat(bytes - '{"type":"send","data":""}'.length)}"}`;
    p.guest.send(frame(1000));
    for (const member of [p.host, p.second]) expect(await member.next()).toMatchObject({ from: 1 });
    p.guest.send(frame(1001));
    expect((await p.guest.closed).code).toBe(1009);
    expect(await p.host.next()).toEqual({ type: "peer_left", index: 1 });
    p.host.send({ type: "send", data: 1 });
    expect(await p.second.soFar()).toEqual([
      { type: "peer_left", index: 1 },
      { type: "message", from: 0, data: 1 },
    ]);
  });
});

describe("state", () => {
  test("goes to the others now, byte for byte, and to everyone who joins or returns, after joined", async () => {
    await using p = await party(1);
    p.host.send('{ "data" : { "n":1.0, "n":2 } , "type":"set_state"}');
    const frame = '{"type":"state","data":{ "n":1.0, "n":2 }}';
    expect(await p.guest.nextText()).toBe(frame);
    expect(await p.host.soFar()).toEqual([]);
    const late = await p.open();
    await late.join(p.room, "late");
    expect(await late.nextText()).toBe(frame);
  });
  test("null is kept as null", async () => {
    await using p = await party(0);
    p.host.send({ type: "set_state", data: null });
    const late = await p.open();
    await late.join(p.room, "late");
    expect(await late.next()).toEqual({ type: "state", data: null });
  });
  test("refusals: without data, over 16384 bytes, by a guest, outside a room", async () => {
    await using p = await party(1);
    expect(await p.host.ask(odd({ type: "set_state" }))).toEqual(error("State data is required", "bad_request"));
    expect(await p.host.ask({ type: "set_state", data: "é".repeat(8192) })).toEqual(error("State too large", "state_too_large"));
    p.host.send({ type: "set_state", data: "é".repeat(8191) });
    expect(await p.guest.next()).toMatchObject({ type: "state" });
    expect(await p.guest.ask(odd({ type: "set_state" }))).toEqual(error("Only the host can set state", "not_host"));
    expect(await (await p.open()).ask(odd({ type: "set_state" }))).toEqual(error("Not in a room", "not_in_room"));
  });
});

describe("close_room", () => {
  test("closes every socket with 4001, without peer_left; the code is gone at once", async () => {
    await using p = await party(2);
    p.host.send({ type: "close_room" });
    for (const member of [p.host, p.guest, p.second]) {
      expect(await member.closed).toEqual({ code: 4001, reason: "room closed" });
      expect(member.next()).rejects.toThrow("before a frame came");
    }
    expect((await p.get(`/room/${p.room}`)).status).toBe(404);
  });
  test("is the host's", async () => {
    await using p = await party(1);
    expect(await p.guest.ask({ type: "close_room" })).toEqual(error("Only the host can close the room", "not_host"));
  });
});

describe("set_room", () => {
  test("a locked room keeps strangers out and lets its own people back in", async () => {
    await using p = await party(1);
    p.host.send({ type: "set_room", locked: true });
    for (const member of [p.host, p.guest]) expect(await member.next()).toEqual({ type: "room", locked: true, maxClients: 8 });
    expect(await (await p.open()).join(p.room, "stranger")).toEqual(error("Room is locked", "room_locked"));
    await p.guest.close();
    expect(await (await p.open()).join(p.room, "guest-1")).toMatchObject({
      type: "joined",
      index: 1,
      locked: true,
      resumed: true,
    });
    expect(await (await p.get(`/room/${p.room}`)).json()).toMatchObject({ locked: true });
  });
  test("lowering maxClients evicts nobody, and unlocking leaves no trace", async () => {
    await using p = await party(2);
    p.host.send({ type: "set_room", locked: true });
    p.host.send({ type: "set_room", locked: false, maxClients: 1 });
    expect((await p.guest.soFar()).at(-1)).toEqual({ type: "room", locked: false, maxClients: 1 });
    expect(await (await p.open()).join(p.room, "c")).toMatchObject({ code: "room_full" });
    expect(await (await p.get(`/room/${p.room}`)).json()).toEqual({
      clients: 3,
      maxClients: 1,
      origin: "unknown",
    });
  });
  test("checks all before it applies any", async () => {
    await using p = await party(1);
    expect(await p.host.ask(odd({ type: "set_room", locked: true, maxClients: 0 }))).toMatchObject({
      code: "bad_request",
    });
    expect(await p.host.ask(odd({ type: "set_room", locked: null, maxClients: 3 }))).toEqual(
      error("locked must be true or false", "bad_request"),
    );
    expect(await p.host.ask({ type: "set_room", maxClients: 1001 })).toEqual(
      error("maxClients must be at most 1000", "bad_request"),
    );
    expect(await p.guest.soFar()).toEqual([]);
    expect(await (await p.get(`/room/${p.room}`)).json()).toMatchObject({ maxClients: 8 });
  });
});

describe("kick", () => {
  test("bars the clientId, closes its socket with 4002, and tells the others", async () => {
    await using p = await party(2);
    p.host.send({ type: "kick", index: 1 });
    expect(await p.guest.closed).toEqual({ code: 4002, reason: "kicked" });
    for (const other of [p.host, p.second]) expect(await other.next()).toEqual({ type: "peer_left", index: 1, reason: "kicked" });
    expect(await (await p.open()).join(p.room, "guest-1")).toEqual(error("Kicked from room", "kicked"));
  });
  test("bars a vacant slot in silence, and a second kick is silent", async () => {
    await using p = await party(2);
    await p.guest.close();
    await p.host.next();
    p.host.send({ type: "kick", index: 1 });
    p.host.send({ type: "kick", index: 1 });
    expect(await p.host.soFar()).toEqual([]);
    expect(await (await p.open()).join(p.room, "guest-1")).toMatchObject({ code: "kicked" });
  });
  test("refusals: never issued, no index, oneself, not the host", async () => {
    await using p = await party(1);
    for (const index of [2, 99, -1, "1", null, undefined, 0.5])
      expect(await p.host.ask(odd({ type: "kick", index }))).toEqual(error("Target peer not found", "peer_not_found"));
    expect(await p.host.ask({ type: "kick", index: 0 })).toEqual(error("Cannot kick yourself", "bad_request"));
    expect(await p.guest.ask({ type: "kick", index: 0 })).toMatchObject({
      code: "not_host",
      message: expect.stringMatching(/^Only the host can /),
    });
  });
});

describe("set_host", () => {
  test("hands the role on, and tells everyone; joiners learn it", async () => {
    await using p = await party(1);
    p.host.send({ type: "set_host", index: 1 });
    for (const member of [p.host, p.guest]) expect(await member.next()).toEqual({ type: "host", index: 1 });
    expect(await p.host.ask({ type: "set_state", data: 1 })).toMatchObject({ code: "not_host" });
    expect(await (await p.open()).join(p.room, "c")).toMatchObject({ host: 1 });
    p.guest.send({ type: "kick", index: 0 });
    expect((await p.host.closed).code).toBe(4002);
  });
  test("to oneself is silent, to a vacant or unknown slot refused", async () => {
    await using p = await party(1);
    p.host.send({ type: "set_host", index: 0 });
    expect(await p.host.soFar()).toEqual([]);
    await p.guest.close();
    await p.host.next();
    for (const index of [1, 5, "0"])
      expect(await p.host.ask(odd({ type: "set_host", index }))).toEqual(error("Target peer not found", "peer_not_found"));
  });
});

describe("offer_slot and claim", () => {
  const claim = (client: Client, room: string, clientId: string, token: string) =>
    client.ask({ type: "join", room, clientId, claim: token });
  const NOT_FOUND = error("Claim not found", "claim_not_found");
  async function offered(guests = 1, overrides: Partial<Config> = {}, options: object = {}) {
    const p = await party(guests, overrides, options);
    const { index, token } = await p.host.ask({ type: "offer_slot", index: 1 });
    expect(index).toBe(1);
    return { ...p, token: token as string };
  }

  test("give whoever asked a token, and nobody else anything", async () => {
    await using p = await party(2);
    for (const message of [{ type: "offer_slot" }, { type: "offer_slot", index: 1 }] as const)
      expect(await p.guest.ask(message)).toEqual({
        type: "slot_offer",
        index: 1,
        token: expect.stringMatching(/^[\w-]{22}$/),
      });
    expect(await p.host.soFar()).toEqual([]);
    expect(await p.second.soFar()).toEqual([]);
  });
  test("move a slot whose socket is open: that one gets 4000, peers see nothing, the old clientId is a stranger", async () => {
    await using p = await offered();
    const phone = await p.open();
    expect(await claim(phone, p.room, "new phone", p.token)).toEqual({
      type: "joined",
      room: p.room,
      index: 1,
      peers: [0],
    });
    expect(await p.guest.closed).toEqual({ code: 4000, reason: "replaced" });
    expect(await p.host.soFar()).toEqual([]);
    expect(await (await p.open()).join(p.room, "guest-1")).toMatchObject({ index: 2 });
  });
  test("move a vacant slot: resumed, for the peers too", async () => {
    await using p = await offered();
    await p.guest.close();
    await p.host.next();
    expect(await claim(await p.open(), p.room, "new phone", p.token)).toMatchObject({ index: 1, resumed: true });
    expect(await p.host.next()).toEqual({ type: "peer_joined", index: 1, resumed: true });
  });
  test("a token is good once; a reload after the claim comes back by its clientId, whatever it claims", async () => {
    await using p = await offered();
    const phone = await p.open();
    await claim(phone, p.room, "new phone", p.token);
    expect(await claim(await p.open(), p.room, "another", p.token)).toEqual(NOT_FOUND);
    await phone.close();
    expect(await claim(await p.open(), p.room, "new phone", p.token)).toMatchObject({ index: 1, resumed: true });
  });
  test("a newer offer replaces an older one, and an offer ends after 300 s", async () => {
    const clock = new TestClock();
    await using p = await offered(1, { clock });
    const { token } = await p.host.ask({ type: "offer_slot", index: 1 });
    expect(await claim(await p.open(), p.room, "x", p.token)).toEqual(NOT_FOUND);
    clock.advance(5_000);
    const later = (await p.host.ask({ type: "offer_slot", index: 1 })).token;
    expect(await claim(await p.open(), p.room, "x", token)).toEqual(NOT_FOUND);
    const { now } = clock;
    clock.now = () => now.call(clock) + 299_999;
    const inTime = await p.open();
    expect(await claim(inTime, p.room, "x", later)).toMatchObject({ index: 1 });
    const last = (await inTime.ask({ type: "offer_slot" })).token;
    clock.now = () => now.call(clock) + 2 * 299_999 + 1;
    expect(await claim(await p.open(), p.room, "y", last)).toEqual(NOT_FOUND);
  });
  test("a lock keeps no claim out, a full room does, and the offer is still good after that", async () => {
    await using p = await offered();
    await p.guest.close();
    await p.host.next();
    const third = await p.open();
    await third.join(p.room, "third");
    await p.host.next();
    await p.host.ask({ type: "set_room", locked: true, maxClients: 2 });
    expect(await claim(await p.open(), p.room, "new", p.token)).toMatchObject({ code: "room_full" });
    await third.close();
    await p.host.next();
    expect(await claim(await p.open(), p.room, "new", p.token)).toMatchObject({ index: 1, resumed: true, locked: true });
  });
  test("the host's slot can be offered, and stays host", async () => {
    await using p = await party(1);
    const { token } = await p.host.ask({ type: "offer_slot" });
    const phone = await p.open();
    expect(await claim(phone, p.room, "new", token)).toMatchObject({ index: 0 });
    expect(await phone.ask({ type: "set_room", locked: true })).toMatchObject({ type: "room" });
  });
  test("are refused for another's slot to who isn't host, and for one that nobody has", async () => {
    await using p = await party(2);
    for (const index of [0, 2, 9])
      expect(await p.guest.ask({ type: "offer_slot", index })).toEqual(
        error("Only the host can offer another's slot", "not_host"),
      );
    for (const index of [9, -1, "1", null, 1.5])
      expect(await p.host.ask(odd({ type: "offer_slot", index }))).toEqual(error("Target peer not found", "peer_not_found"));
    expect(await (await p.open()).ask({ type: "offer_slot" })).toMatchObject({ code: "not_in_room" });
    p.host.send({ type: "kick", index: 1 });
    await p.host.next();
    expect(await p.host.ask({ type: "offer_slot", index: 1 })).toMatchObject({ code: "peer_not_found" });
  });
  test("a claim is no good after a kick, in another room, or guessed; who is kicked stays out, whatever it claims", async () => {
    await using p = await offered(2);
    const { token } = await p.host.ask({ type: "offer_slot", index: 2 });
    p.host.send({ type: "kick", index: 1 });
    await p.host.next();
    expect(await claim(await p.open(), p.room, "x", p.token)).toEqual(NOT_FOUND);
    expect(await claim(await p.open(), p.room, "guest-1", token)).toMatchObject({ code: "kicked" });
    const other = await (await p.open()).create();
    expect(await claim(await p.open(), other, "x", token)).toEqual(NOT_FOUND);
    for (const guess of ["", "x", `${token}x`, token.toLowerCase() + " "])
      expect(await claim(await p.open(), p.room, "x", guess)).toEqual(NOT_FOUND);
    expect(await (await p.open()).ask(odd({ type: "join", room: p.room, clientId: "x", claim: 1 }))).toEqual(
      error("claim must be a string", "bad_request"),
    );
  });
  test("who is in the room already can't claim, and a clientId that the room knows joins its own slot", async () => {
    await using p = await offered(2);
    expect(await claim(p.second, p.room, "x", p.token)).toMatchObject({ code: "already_in_room" });
    await p.second.close();
    await p.host.next();
    expect(await claim(await p.open(), p.room, "guest-2", p.token)).toMatchObject({ index: 2 });
    expect(await claim(await p.open(), p.room, "x", p.token)).toMatchObject({ index: 1 });
  });
  test("a wrong claim is a miss", async () => {
    await using p = await party(0, { maxMissesPerMinute: 2, addressHeader: "X-Forwarded-For" });
    const guest = await Client.open(p.relay.url, { "X-Forwarded-For": "9.9.9.9" });
    for (let i = 0; i < 2; i++) expect(await claim(guest, p.room, "x", "guess")).toEqual(NOT_FOUND);
    expect(await claim(guest, p.room, "x", "guess")).toMatchObject({ code: "too_many_attempts" });
    expect((await guest.closed).code).toBe(1008);
  });
  test("work in a drain", async () => {
    await using p = await party(1, { clock: new TestClock() });
    void p.relay.drain();
    await p.host.next();
    const { token } = await p.host.ask({ type: "offer_slot", index: 1 });
    expect(await claim(await p.open(), p.room, "new", token)).toMatchObject({ index: 1 });
  });
});

describe("the operator's defaults", () => {
  test("linger: a room whose create names none outlives its last socket", async () => {
    const clock = new TestClock();
    await using p = await party(0, { clock, defaultLingerSeconds: 20 });
    await p.host.close();
    await until("the room to be empty", async () => (await (await p.get("/")).text()) === "rooms: 1\nclients: 0\n", SOON_MS);
    clock.advance(19_000);
    const host = await p.open();
    expect(await host.join(p.room, "host")).toMatchObject({ resumed: true });
    const second = await p.open();
    const gone = await second.create(2, "second", { linger: 0 });
    await second.close();
    await until("the room to be gone", async () => (await p.get(`/room/${gone}`)).status === 404, SOON_MS);
  });
  test("hostGrace: closes the room, or with migrate hands the role on; 0 asks for none", async () => {
    const clock = new TestClock();
    const rooms = [];
    await using relay = testRelay({ clock, defaultHostGraceSeconds: 5 });
    for (const options of [{}, { migrate: true }, { hostGrace: 0 }]) {
      const host = await Client.open(relay.url);
      const guest = await Client.open(relay.url);
      await guest.join(await host.create(4, "host", options), "guest");
      await host.close();
      await guest.next();
      rooms.push(guest);
    }
    clock.advance(5_000);
    const [closed, migrated, endless] = rooms as [Client, Client, Client];
    expect(await closed.closed).toEqual({ code: 4001, reason: "room closed" });
    expect(await migrated.next()).toEqual({ type: "host", index: 1 });
    expect(await endless.soFar()).toEqual([]);
  });
});

describe("leave", () => {
  test("gives left, tells the others, keeps the slot, and the socket may join again", async () => {
    await using p = await party(1);
    expect(await p.guest.ask({ type: "leave" })).toEqual({ type: "left", room: p.room });
    expect(await p.host.next()).toEqual({ type: "peer_left", index: 1, reason: "left" });
    expect(await p.guest.ask({ type: "leave" })).toEqual(error("Not in a room", "not_in_room"));
    p.host.send({ type: "send", data: 1 });
    expect(await p.guest.soFar()).toEqual([]);
    expect(await p.guest.join(p.room, "guest-1")).toMatchObject({ index: 1, resumed: true });
    await p.guest.ask({ type: "leave" });
    expect(await p.guest.create(2, "x")).toHaveLength(6);
  });
});

describe("ping", () => {
  test("gives pong with t if it is a finite number, in or out of a room", async () => {
    const clock = new TestClock();
    await using p = await party(0, { clock });
    const now = clock.epoch();
    expect(await p.host.ask({ type: "ping" })).toEqual({ type: "pong", now });
    const guest = await p.open();
    expect(await guest.ask({ type: "ping", t: 12.5 })).toEqual({ type: "pong", t: 12.5, now });
    for (const t of ['"1"', "null", "1e999", "{}"])
      expect(await guest.ask(`{"type":"ping","t":${t}}`)).toEqual({ type: "pong", now });
  });
});

describe("linger", () => {
  test("keeps a room whose last socket closed, for that many seconds", async () => {
    const clock = new TestClock();
    await using p = await party(0, { clock }, { linger: 30 });
    await p.host.close();
    clock.advance(29_999);
    expect(await (await p.get(`/room/${p.room}`)).json()).toMatchObject({ clients: 0 });
    const again = await p.open();
    expect(await again.join(p.room, "host")).toMatchObject({ index: 0, peers: [], resumed: true });
    await again.close();
    clock.advance(30_000);
    expect((await p.get(`/room/${p.room}`)).status).toBe(404);
  });
  test("is over when the last member says leave", async () => {
    await using p = await party(0, {}, { linger: 30 });
    await p.host.ask({ type: "leave" });
    expect((await p.get(`/room/${p.room}`)).status).toBe(404);
  });
});

describe("hostGrace", () => {
  test("closes the room when the host has been away so long; a return starts it anew", async () => {
    const clock = new TestClock();
    await using p = await party(1, { clock }, { hostGrace: 10 });
    await p.host.close();
    await p.guest.next();
    clock.advance(9_000);
    const again = await p.open();
    await again.join(p.room, "host");
    await p.guest.next();
    clock.advance(11_000);
    await again.close();
    await p.guest.next();
    clock.advance(9_999);
    expect(await p.guest.soFar()).toEqual([]);
    clock.advance(1);
    expect(await p.guest.closed).toEqual({ code: 4001, reason: "room closed" });
  });
  test("with migrate hands the role to the lowest connected slot; the former host returns as a peer", async () => {
    const clock = new TestClock();
    await using p = await party(2, { clock }, { hostGrace: 10, migrate: true });
    await p.host.close();
    for (const member of [p.guest, p.second]) await member.next();
    clock.advance(10_000);
    for (const member of [p.guest, p.second]) expect(await member.next()).toEqual({ type: "host", index: 1 });
    const again = await p.open();
    expect(await again.join(p.room, "host")).toMatchObject({ index: 0, host: 1 });
    expect(await again.ask({ type: "close_room" })).toMatchObject({ code: "not_host" });
  });
  test("doesn't run while nobody is connected, and a replaced host was never away", async () => {
    const clock = new TestClock();
    await using p = await party(1, { clock }, { hostGrace: 10, linger: 300 });
    const again = await p.open();
    await again.join(p.room, "host");
    clock.advance(11_000);
    expect(await p.guest.soFar()).toEqual([]);
    await again.close();
    await p.guest.next();
    await p.guest.close();
    clock.advance(60_000);
    const guest = await p.open();
    expect(await guest.join(p.room, "guest-1")).toMatchObject({ type: "joined" });
    clock.advance(9_000);
    expect(await guest.soFar()).toEqual([]);
    clock.advance(1_000);
    expect((await guest.closed).code).toBe(4001);
  });
  test("with migrate makes the lowest slot host, however late it came back", async () => {
    const clock = new TestClock();
    await using p = await party(2, { clock }, { hostGrace: 10, migrate: true });
    const again = await p.open();
    await again.join(p.room, "guest-1"); // the newest socket
    await p.host.close();
    for (const member of [again, p.second]) expect(await member.next()).toEqual({ type: "peer_left", index: 0 });
    clock.advance(10_000);
    for (const member of [again, p.second]) expect(await member.next()).toEqual({ type: "host", index: 1 });
  });
  test("ends with its room: nothing happens when it would have been over", async () => {
    const clock = new TestClock();
    await using p = await party(1, { clock }, { hostGrace: 10, migrate: true });
    await p.host.close();
    await p.guest.next();
    await p.guest.ask({ type: "leave" });
    await p.guest.create();
    clock.advance(10_000); // a countdown that went on would throw here
    expect(await readMetric(p.relay.url, "party_sockets_rooms_by_origin")).toEqual({ unknown: 1 });
  });
});

describe("HTTP", () => {
  test("/health, /room/:code and / answer what they should", async () => {
    await using relay = testRelay({ instance: "m1" });
    const host = await Client.open(relay.url, { Origin: `https://game.example/${"x".repeat(300)}` });
    const room = await host.create(3);
    const health = await fetch(`${relay.url}/health`);
    expect([health.status, await health.text()]).toEqual([200, '{"status":"ok"}']);
    const found = await fetch(`${relay.url}/room/${room}`);
    expect(await found.json()).toEqual({
      clients: 1,
      maxClients: 3,
      origin: `https://game.example/${"x".repeat(300)}`.slice(0, 256),
    });
    expect(found.headers.get("X-Instance-Id")).toBe("m1");
    const missing = await fetch(`${relay.url}/room/zzzzzz`);
    expect([missing.status, await missing.text(), missing.headers.get("X-Instance-Id")]).toEqual([
      404,
      '{"error":"Room not found"}',
      "m1",
    ]);
    for (const path of ["/", "/any/other", "/room", "/room/", "/room/a/b"]) {
      const page = await fetch(relay.url + path);
      expect([page.status, await page.text()]).toEqual([200, "rooms: 1\nclients: 1\n"]);
    }
  });

  test("/ goes to the dashboard if there is one", async () => {
    await using relay = testRelay({ dashboardUrl: "https://stats.example/d" });
    const page = await fetch(`${relay.url}/`, { redirect: "manual" });
    expect([page.status, page.headers.get("location")]).toEqual([302, "https://stats.example/d"]);
    expect((await fetch(`${relay.url}/health`)).status).toBe(200);
  });

  test("every answer can be read across origins, OPTIONS and HEAD work, other methods get 405", async () => {
    await using relay = testRelay();
    for (const path of ["/", "/health", "/metrics", "/room/zzzzzz", "/room/%", "/x"])
      for (const method of ["GET", "HEAD", "OPTIONS", "POST", "PUT", "DELETE", "PATCH"]) {
        const body = method === "POST" || method === "PUT" ? "hello" : undefined;
        const got = await fetch(relay.url + path, { method, ...(body === undefined ? {} : { body }) });
        expect(got.headers.get("access-control-allow-origin")).toBe("*");
        expect(got.headers.get("access-control-expose-headers")).toBe("X-Instance-Id");
        const read = path.startsWith("/room") ? 404 : 200;
        const text = await got.text();
        if (method === "GET") expect(got.status).toBe(read);
        else if (method === "HEAD") expect([got.status, text]).toEqual([read, ""]);
        else if (method === "OPTIONS") expect([got.status, text]).toEqual([204, ""]);
        else expect([got.status, got.headers.get("allow")]).toEqual([405, "GET, HEAD, OPTIONS"]);
      }
  });

  test("an upgrade is taken on any path", async () => {
    await using relay = testRelay();
    for (const path of ["/", "/health", "/room/x", "/%"])
      expect(await (await Client.open(relay.url + path)).create()).toHaveLength(6);
  });
  test("a preflight allows what a page may want to ask", async () => {
    await using relay = testRelay();
    const { headers } = await fetch(`${relay.url}/room/zzzzzz`, { method: "OPTIONS" });
    expect(headers.get("access-control-allow-methods")).toBe("GET, HEAD, OPTIONS");
    expect(headers.get("access-control-allow-headers")).toBe("*");
  });

  test("is served at HOST, and nowhere else", async () => {
    await using relay = testRelay({ host: "127.0.0.2" });
    expect((await fetch(`${relay.url}/health`)).status).toBe(200);
    expect(await fetch(`http://127.0.0.1:${relay.port}/health`).catch(() => "refused")).toBe("refused");
  });
});

describe("misses", () => {
  const from = (address: string) => ({ "X-Forwarded-For": address });
  /** A relay on which `1.1.1.1` has missed as often as it may: over HTTP, or on sockets. */
  async function usedUp(how: "look-ups" | "joins") {
    const clock = new TestClock();
    const relay = testRelay({ clock, maxMissesPerMinute: 3, addressHeader: "X-Forwarded-For" });
    const get = async (path: string, address = "1.1.1.1") => (await fetch(relay.url + path, { headers: from(address) })).status;
    const open = (address = "1.1.1.1") => Client.open(relay.url, from(address));
    const elsewhere = await open("2.2.2.2");
    const room = await elsewhere.create();
    const guesser = await open();
    for (let i = 0; i < 3; i++)
      if (how === "look-ups") expect(await get("/room/zzzzzz")).toBe(404);
      else expect(await guesser.join("zzzzzz", "b")).toMatchObject({ code: "room_not_found" });
    return { clock, relay, get, open, elsewhere, room, guesser, [Symbol.asyncDispose]: () => relay[Symbol.asyncDispose]() };
  }

  test("of look-ups over the limit: every look-up from there is 429, until the minute ends", async () => {
    await using at = await usedUp("look-ups");
    expect([await at.get("/room/zzzzzz"), await at.get(`/room/${at.room}`)]).toEqual([429, 429]);
    expect(await at.get("/health")).toBe(200);
    expect(await at.get(`/room/${at.room}`, "3.3.3.3")).toBe(200);
    at.clock.advance(60_000);
    const room = await (await at.open("2.2.2.2")).create();
    expect([await at.get(`/room/${room}`), await at.get("/room/zzzzzz")]).toEqual([200, 404]);
  });
  test("of look-ups keep nobody from joining", async () => {
    await using at = await usedUp("look-ups");
    expect(await at.get("/room/zzzzzz")).toBe(429);
    expect(await at.guesser.join(at.room, "b")).toMatchObject({ type: "joined" });
  });
  test("of joins over the limit: a clientId that the room doesn't know is refused with 1008, before looking", async () => {
    await using at = await usedUp("joins");
    expect(await at.get(`/room/${at.room}`)).toBe(200);
    for (const room of ["zzzzzz", at.room]) {
      const guest = await at.open();
      expect(await guest.join(room, "b")).toEqual(error("Too many attempts", "too_many_attempts"));
      expect((await guest.closed).code).toBe(1008);
    }
    at.clock.advance(60_000);
    const room = await (await at.open("2.2.2.2")).create();
    expect(await (await at.open()).join(room, "b")).toMatchObject({ type: "joined" });
  });
  test("over the limit: who is known comes back", async () => {
    await using at = await usedUp("look-ups");
    const guest = await at.open();
    await guest.join(at.room, "guest");
    await guest.close();
    for (let i = 0; i < 3; i++) await at.guesser.join("zzzzzz", "b");
    expect(await (await at.open()).join(at.room, "guest")).toMatchObject({ resumed: true });
  });
  test("over the limit: a room in which somebody from there sits is found and joined all the same", async () => {
    await using at = await usedUp("look-ups");
    await (await at.open()).join(at.room, "who is in already");
    for (let i = 0; i < 3; i++) await at.guesser.join("zzzzzz", "b");
    expect([await at.get(`/room/${at.room}`), await at.get("/room/zzzzzz")]).toEqual([200, 429]);
    expect(await (await at.open()).join(at.room, "a friend")).toMatchObject({ type: "joined" });
    expect(await (await at.open()).join("zzzzzz", "a friend")).toMatchObject({ code: "too_many_attempts" });
  });
  test("count by the address that the proxy names last", async () => {
    await using relay = testRelay({ addressHeader: "X-Forwarded-For", maxMissesPerMinute: 1 });
    const look = async (from: string) =>
      (await fetch(`${relay.url}/room/zzzzzz`, { headers: { "X-Forwarded-For": from } })).status;
    expect(await look("9.9.9.9, 1.1.1.1")).toBe(404);
    expect(await look("8.8.8.8, 1.1.1.1")).toBe(429);
    expect(await look("1.1.1.1, 2.2.2.2")).toBe(404);
  });
  test("an IPv6 address counts as its /56, an IPv4-mapped one as IPv4", () => {
    expect(addressKey("2001:db8:1:2:3:4:5:6")).toBe("2001:db8:1:0::/56");
    expect(addressKey("2001:db8:1:2::9")).toBe("2001:db8:1:0::/56");
    expect(addressKey("::1")).toBe("0:0:0:0::/56");
    expect(addressKey("::ffff:1.2.3.4")).toBe("1.2.3.4");
    expect(addressKey("::FFFF:102:304")).toBe("1.2.3.4");
    expect(addressKey("fe80::1%eth0")).toBe("fe80:0:0:0::/56");
    expect(addressKey(" 1.2.3.4:5678 ")).toBe("1.2.3.4");
    expect(addressKey("[2001:db8:1:2::9]")).toBe("2001:db8:1:0::/56");
    expect(addressKey("[::ffff:1.2.3.4]:5678")).toBe("1.2.3.4");
    expect(addressKey("1:2:3:4::1.2.3.4")).toBe("1:2:3:0::/56");
    expect(addressKey("2001:DB8:0:02::1.2.3.4")).toBe("2001:db8:0:0::/56");
    expect(addressKey("::0:abcd:0:ffff:1.2.3.4")).toBe("0:0:0:ab00::/56");
    expect(addressKey("0:0:0:0:0:ffff:255.0.0.1")).toBe("255.0.0.1");
    expect(addressKey("::1.2.3.4")).toBe("0:0:0:0::/56");
    expect(addressKey("1::")).toBe("1:0:0:0::/56");
    expect(addressKey("::")).toBe("0:0:0:0::/56");
    expect(addressKey("1.2.3.4")).toBe("1.2.3.4");
    expect(addressKey("1:2:3:4:5:6:7:8:9")).toBeUndefined();
    expect(addressKey("nonsense")).toBeUndefined();
  });
  test("count for who says to be a sibling of a relay that has none", async () => {
    await using relay = testRelay({ maxMissesPerMinute: 1 });
    const look = async () => (await fetch(`${relay.url}/room/zzzzzz`, { headers: { "X-Party-Probe": "1" } })).status;
    expect([await look(), await look()]).toEqual([404, 429]);
  });
});

describe("an address", () => {
  test("behind a proxy is one however it is spelled: an IPv6 network, or IPv4 mapped into IPv6", async () => {
    await using relay = testRelay({ addressHeader: "X-Forwarded-For", maxMissesPerMinute: 1 });
    const look = async (from: string) =>
      (await fetch(`${relay.url}/room/zzzzzz`, { headers: { "X-Forwarded-For": from } })).status;
    for (const from of ["2001:db8:1:2::1", "2001:DB8:1:2:3::9"]) await look(from);
    expect(await look("2001:db8:1:2:ffff:ffff:ffff:ffff")).toBe(429);
    expect(await look("2001:db8:2:2::1")).toBe(404);
    for (const from of ["::ffff:192.0.2.1", "192.0.2.1"]) await look(from);
    expect(await look("::FFFF:c000:201")).toBe(429);
    expect(await look("::ffff:192.0.2.2")).toBe(404);
  });
  test("that is none in the proxy's header is the connection's own", async () => {
    await using relay = testRelay({ addressHeader: "X-Forwarded-For", maxMissesPerMinute: 1 });
    const look = async (headers: Record<string, string>) =>
      (await fetch(`http://127.0.0.1:${relay.port}/room/zzzzzz`, { headers })).status;
    expect(await look({})).toBe(404);
    for (const named of ["unknown", "1.1.1.1, unknown"]) expect(await look({ "X-Forwarded-For": named })).toBe(429);
    expect(await look({ "X-Forwarded-For": "1.1.1.1" })).toBe(404);
  });
  test("in a header that isn't used is mentioned in the log, once", async () => {
    const events: string[] = [];
    await using relay = testRelay({ log: (event) => event !== "few descriptors" && events.push(event) });
    for (const address of ["1.1.1.1", "2.2.2.2"]) await fetch(relay.url, { headers: { "X-Forwarded-For": address } });
    expect(events).toEqual(["address header ignored"]);
  });
});

describe("a busy relay", () => {
  /** Two members, and a host who just told the other so much that the relay is busy with the next frame. */
  async function busy() {
    const clock = new TestClock();
    const p = await party(1, { clock, maxMessagesPerSecond: 0 });
    clock.advance(20); // a new window
    for (let n = 0; n < 2_000; n++) p.host.send({ type: "send", data: n, echo: true });
    await p.host.soFar();
    await p.guest.soFar();
    clock.advance(20);
    return { ...p, clock };
  }

  test("rests for less than 2 ms after a turn, before it reads on, and has sent what it had read", async () => {
    await using p = await busy();
    expect(p.clock.rests).toEqual([]);
    for (let turn = 1; turn <= 3; turn++) {
      for (const data of [turn, -turn]) p.host.send({ type: "send", data }); // read in one turn
      for (const data of [turn, -turn]) expect(await p.guest.next()).toMatchObject({ data });
      expect(p.clock.rests.length).toBe(turn);
    }
    expect(Math.max(...p.clock.rests)).toBeLessThan(2);
    expect(Math.min(...p.clock.rests)).toBeGreaterThan(1);
  });
  test("doesn't rest any more when it has calmed down", async () => {
    await using p = await busy();
    await p.guest.soFar();
    const { length } = p.clock.rests;
    expect(length).toBeGreaterThan(0);
    p.clock.advance(20); // in which there was one frame
    await p.guest.soFar();
    await p.guest.soFar();
    expect(p.clock.rests).toHaveLength(length);
  });
  test("doesn't rest after a long turn: enough has gathered meanwhile", async () => {
    await using p = await busy();
    const { now } = p.clock;
    let reads = 0;
    p.clock.now = () => now.call(p.clock) + 9 * reads++; // every look at the clock finds it 9 ms later
    await p.guest.soFar();
    await p.guest.soFar();
    expect(p.clock.rests).toEqual([]);
  });
  test("that rests in real time loses nothing and keeps the order", async () => {
    await using p = await busy();
    let rested = 0;
    p.clock.rest = (ms) => {
      const begun = performance.now();
      systemClock.rest(ms);
      rested += performance.now() - begun;
    };
    for (let begin = 0; begin < 2_000; begin += 100) {
      const sent = Array.from({ length: 100 }, (_, n) => begin + n);
      for (const n of sent) p.host.send({ type: "send", data: n });
      for (const n of sent) expect((await p.guest.next()).data).toBe(n);
    }
    expect(rested).toBeGreaterThan(1);
  });
});

describe("a relay from which the machine withholds CPU", () => {
  /** A party on a machine of the test's own. */
  async function machine() {
    const clock = new TestClock();
    let cpu = 0;
    const p = await party(1, { clock, cpuMs: () => cpu });
    clock.advance(1_000); // joining is over
    return {
      ...p,
      clock,
      /** A message is relayed; the process uses so much CPU, and the clock moves on. */
      async relays(usedMs: number, ms: number, how: "runs" | "stall") {
        await p.guest.soFar();
        cpu += usedMs;
        if (how === "runs") clock.advance(ms);
        else clock.stall(ms);
      },
      /** The rest after the next turn, in ms; 0: none. */
      async nextRest() {
        clock.rests.length = 0;
        await p.guest.soFar();
        return clock.rests[0] ?? 0;
      },
    };
  }

  test("rests for longer and longer, up to 10 ms, as long as it stands still all the same", async () => {
    await using p = await machine();
    const rests: number[] = [];
    for (let period = 0; period < 12; period++) {
      await p.relays(5, 80, "stall");
      rests.push(await p.nextRest());
    }
    expect(rests[0]).toBe(0);
    expect(rests[1]).toBeGreaterThanOrEqual(4);
    expect(rests).toEqual(rests.toSorted((a, b) => a - b));
    expect(rests.at(-1)).toBeGreaterThan(9);
    expect(rests.at(-1)).toBeLessThan(10);
  });
  test("finds a rest with which it doesn't stand still any more, and stays near it", async () => {
    await using p = await machine();
    const rests: number[] = [];
    let stalls = 0;
    for (let period = 0; period < 200; period++) {
      const rest = await p.nextRest();
      const used = 12 / (1 + rest / 2); // in 80 ms, of which 5 are granted
      if (used > 5) stalls++;
      if (used > 5) await p.relays(5, 80, "stall");
      else for (let n = 0; n < 4; n++) await p.relays(used / 4, 20, "runs");
      if (period > 20) rests.push(rest);
    }
    expect(Math.min(...rests)).toBeGreaterThan(2);
    expect(Math.max(...rests)).toBeLessThan(8);
    expect(stalls).toBeLessThan(20);
  });
  test("doesn't rest any more some seconds after CPU is there again", async () => {
    await using p = await machine();
    for (let period = 0; period < 12; period++) await p.relays(5, 80, "stall");
    expect(await p.nextRest()).toBeGreaterThan(8);
    for (let n = 0; n < 10_000 / 20; n++) await p.relays(3, 20, "runs");
    expect(await p.nextRest()).toBe(0);
  });
  test.each([
    ["that stood still once", [0, 80, "stall", 300]],
    ["that shares its core with another process", [10, 28, "stall", 20]],
    ["that works all the time", [80, 80, "stall", 0]],
    ["that runs freely", [2, 20, "runs", 0]],
  ] as const)("is none %s: it doesn't rest", async (_, [usedMs, ms, how, pauseMs]) => {
    await using p = await machine();
    for (let n = 0; n < 20; n++) {
      await p.relays(usedMs, ms, how);
      p.clock.advance(pauseMs);
    }
    expect(p.clock.rests).toEqual([]);
  });
  test("has no timer for that while nobody says anything", async () => {
    await using p = await machine();
    const { pending } = p.clock;
    await p.guest.soFar();
    expect(p.clock.pending).toBe(pending + 1);
    p.clock.advance(40);
    expect(p.clock.pending).toBe(pending);
  });
});

describe("caps", () => {
  test("over MAX_ROOMS the lingering room that is nearest its end gives way, and without one: Server full", async () => {
    const clock = new TestClock();
    await using relay = testRelay({ maxRooms: 4, clock });
    const rooms: string[] = [];
    for (const linger of [100, 200, 100, 150]) {
      const host = await Client.open(relay.url);
      rooms.push(await host.create(8, "host", { linger }));
      await host.close();
      clock.advance(1_000);
    }
    const back = await Client.open(relay.url);
    expect(await back.join(rooms[0] as string, "host")).toMatchObject({ resumed: true });
    await back.close(); // its 100 s begin anew, after those of the third
    const status = () => Promise.all(rooms.map(async (room) => (await fetch(`${relay.url}/room/${room}`)).status));
    const hosts: Client[] = [];
    for (const left of [
      [200, 200, 404, 200],
      [404, 200, 404, 200],
      [404, 200, 404, 404],
      [404, 404, 404, 404],
    ]) {
      const host = await Client.open(relay.url);
      await host.create();
      hosts.push(host);
      expect(await status()).toEqual(left);
    }
    const late = await Client.open(relay.url);
    const create = { type: "create", clientId: "late", maxClients: 2 } as const;
    expect(await late.ask(create)).toEqual(error("Server full", "capacity"));
    await hosts[0]?.close();
    expect(await late.ask(create)).toMatchObject({ type: "created" });
  });
  test("over MAX_CONNECTIONS the longest roomless socket is closed with 1013, and with none the newcomer", async () => {
    await using relay = testRelay({ maxConnections: 3 });
    const full = { code: 1013, reason: "server full" };
    const player = await Client.open(relay.url);
    await player.create();
    const other = await Client.open(relay.url);
    const roomless = await Client.open(relay.url);
    await other.create();
    await other.ask({ type: "leave" }); // roomless from now on
    const third = await Client.open(relay.url);
    expect(await roomless.closed).toEqual(full);
    const fourth = await Client.open(relay.url);
    expect(await other.closed).toEqual(full);
    await third.create();
    await fourth.create();
    const newcomer = await Client.open(relay.url);
    expect(await newcomer.closed).toEqual(full);
    for (const client of [player, third, fourth]) expect(await client.soFar()).toEqual([]);
    expect(await readMetric(relay.url, "party_sockets_errors_total")).toMatchObject({ capacity: 3 }); // operators are alerted by it
  });
  test("are none at 0: messages of any size, sockets and rooms of any number, any rate, any guesses", async () => {
    const none = { maxMessageBytes: 0, maxBufferedBytes: 0, maxClientsPerRoom: 0, maxRooms: 0, maxConnections: 0 };
    await using relay = testRelay({ ...none, maxMessagesPerSecond: 0, maxMissesPerMinute: 0, clock: new TestClock() });
    const host = await Client.open(relay.url);
    const guest = await Client.open(relay.url);
    await guest.join(await host.create(1_000_000), "guest");
    await host.next();
    guest.send({ type: "send", data: "x".repeat(3_000_000) });
    expect((await host.next()).data).toHaveLength(3_000_000);
    const numbers = Array.from({ length: 1_000 }, (_, n) => n);
    for (const data of numbers) guest.send({ type: "send", data });
    for (const data of numbers) expect((await host.next()).data).toBe(data);
    const guesser = await Client.open(relay.url);
    for (let n = 0; n < 300; n++) expect(await guesser.join("111111", "x")).toMatchObject({ code: "room_not_found" });
  });
  test("a lingering room that gave way is over once: its time ends nothing any more", async () => {
    const clock = new TestClock();
    await using relay = testRelay({ maxRooms: 1, clock });
    const screen = await Client.open(relay.url);
    await screen.create(2, "host", { linger: 5 });
    await screen.close();
    const other = await Client.open(relay.url);
    await until("the room to be empty", async () => (await (await fetch(relay.url)).text()).includes("clients: 0"), SOON_MS);
    await other.create();
    clock.advance(5_000);
    expect(await readMetric(relay.url, "party_sockets_rooms_by_origin")).toEqual({ unknown: 1 });
  });
  test("are logged once a minute while they are reached", async () => {
    const clock = new TestClock();
    const logged: string[] = [];
    await using relay = testRelay({ clock, maxRooms: 1, log: (_, { cap }) => cap !== undefined && logged.push(String(cap)) });
    await (await Client.open(relay.url)).create();
    for (const times of [1, 2]) {
      const late = await Client.open(relay.url);
      for (const _ of [1, 2])
        expect(await late.ask({ type: "create", clientId: "a", maxClients: 2 })).toMatchObject({ code: "capacity" });
      expect(logged).toEqual(Array(times).fill("rooms"));
      const { now } = clock;
      clock.now = () => now.call(clock) + 60_000;
    }
  });
  test("of misses and of unsent bytes are logged, too", async () => {
    const caps: unknown[] = [];
    const log: Config["log"] = (event, { cap }) => event === "cap reached" && caps.push(cap);
    const clock = new TestClock(); // by which memory stays as it is
    await using p = await party(1, { clock, maxMissesPerMinute: 1, maxBufferedBytes: 40_000, maxMessageBytes: 10_000, log });
    const guesser = await p.open();
    for (const code of ["room_not_found", "too_many_attempts"]) expect(await guesser.join("zzzzzz", "a")).toMatchObject({ code });
    expect(caps).toEqual(["misses"]);
    for (let n = 0; n < 5; n++) p.host.send({ type: "send", data: "x".repeat(9_000) });
    await p.host.soFar();
    p.guest.terminate(); // not heard from while a whole buffer was sent: it looks like a cut
    expect(await p.host.next()).toMatchObject({ type: "peer_left" });
    expect(caps).toEqual(["misses", "buffered bytes"]);
  });
});

describe("stopping", () => {
  test("without rooms is at once, and says so", async () => {
    await using relay = testRelay({ clock: new TestClock(), drainSeconds: 8 });
    const roomless = await Client.open(relay.url);
    void relay.drain();
    expect(await roomless.next()).toEqual({ type: "draining", seconds: 0 });
    expect(await roomless.closed).toEqual({ code: 1012, reason: "restarting" });
  });
  test("tells everyone, refuses create, lets all else go on, and ends with 1012", async () => {
    const clock = new TestClock();
    await using p = await party(1, { clock, drainSeconds: 8 });
    const other = await p.open();
    await other.create();
    const roomless = await p.open();
    const ended = p.relay.drain();
    for (const client of [p.host, p.guest, other, roomless])
      expect(await client.next()).toEqual({ type: "draining", seconds: 8 });
    expect(await roomless.ask({ type: "create", clientId: "a", maxClients: 1 })).toEqual(error("Server draining", "draining"));
    clock.advance(3_500);
    const late = await p.open();
    p.host.send({ type: "set_state", data: 1 });
    await p.guest.next();
    expect((await late.join(p.room, "late")).type).toBe("joined");
    expect(await late.next()).toEqual({ type: "state", data: 1 });
    expect(await late.next()).toEqual({ type: "draining", seconds: 5 });
    late.send({ type: "send", data: "still here" });
    expect(await p.host.soFar()).toEqual([
      { type: "peer_joined", index: 2 },
      { type: "message", from: 2, data: "still here" },
    ]);
    expect((await p.get("/health")).status).toBe(200);
    clock.advance(5_000);
    for (const member of [p.host, p.guest, late, other, roomless])
      expect(await member.closed).toEqual({ code: 1012, reason: "restarting" });
    clock.advance(1_000);
    expect(await ended).toBe("drained");
  });
  test("closes rooms one after another in the last half of a short drain, all sockets of a room at once", async () => {
    const clock = new TestClock();
    await using relay = testRelay({ clock, drainSeconds: 8 });
    const rooms: Client[][] = [];
    for (let n = 0; n < 8; n++) {
      const host = await Client.open(relay.url);
      const guest = await Client.open(relay.url);
      await guest.join(await host.create(), "guest");
      rooms.push([host, guest]);
    }
    const roomless = await Client.open(relay.url);
    const ended = relay.drain();
    clock.advance(4_000);
    for (const [closed, members] of rooms.entries()) {
      expect(await (await fetch(relay.url)).text()).toBe(`rooms: ${8 - closed}\nclients: ${16 - 2 * closed}\n`);
      clock.advance(500 + (closed === 0 ? 20 : 0)); // a step of the closing may be due just after
      for (const member of members) expect(await member.closed).toEqual({ code: 1012, reason: "restarting" });
    }
    expect(await roomless.closed).toEqual({ code: 1012, reason: "restarting" });
    clock.advance(1_000);
    expect(await ended).toBe("drained");
  });
  test("is at once without rooms, when the last one goes, and at the second signal", async () => {
    await using empty = testRelay();
    expect(await empty.drain()).toBe("drained");
    await using p = await party(0);
    const ended = p.relay.drain();
    await p.host.close();
    expect(await ended).toBe("drained");
    await using q = await party(0);
    void q.relay.drain();
    await q.host.next();
    void q.relay.drain();
    expect((await q.host.closed).code).toBe(1012);
  });
  test("a program that embeds it and lets go of it is told that it has ended", async () => {
    const p = await party(1);
    await p.relay[Symbol.asyncDispose]();
    expect(await p.relay.ended).toBe("drained");
    expect(await p.relay.drain()).toBe("drained");
  });
  test("a lone screen's blip costs no room that lingers: it is there again, up to the drain's end", async () => {
    const clock = new TestClock();
    await using p = await party(0, { clock, drainSeconds: 20 }, { linger: 300 });
    const ended = p.relay.drain();
    await p.host.next();
    await p.host.close();
    clock.advance(10_000);
    const host = await p.open();
    expect(await host.join(p.room, "host")).toMatchObject({ type: "joined", resumed: true });
    expect(await host.next()).toEqual({ type: "draining", seconds: 10 });
    await host.close();
    clock.advance(9_900); // closing has begun; who lingers isn't closed before the end
    expect((await p.get(`/room/${p.room}`)).status).toBe(200);
    clock.advance(1_000);
    expect(await ended).toBe("drained");
  });
  test("a blip while rooms are being closed costs no room that lingers, either", async () => {
    const clock = new TestClock();
    await using p = await party(0, { clock, drainSeconds: 6 }, { linger: 300 });
    const other = await p.open();
    await other.create();
    const ended = p.relay.drain();
    for (const client of [p.host, other]) await client.next();
    clock.advance(3_800); // of the last 3 s; this room's end is due at 4.5 s, the other's at 6 s
    await p.host.close();
    await other.soFar();
    clock.advance(1_200);
    const host = await p.open();
    expect(await host.join(p.room, "host")).toMatchObject({ type: "joined", resumed: true });
    expect(await host.next()).toEqual({ type: "draining", seconds: 1 });
    clock.advance(1_500);
    expect(await host.closed).toEqual({ code: 1012, reason: "restarting" });
    clock.advance(1_000);
    expect(await ended).toBe("drained");
  });
  test("ends when what lingered is over", async () => {
    const clock = new TestClock();
    await using p = await party(0, { clock, drainSeconds: 100 }, { linger: 10 });
    const ended = p.relay.drain();
    await p.host.next();
    await p.host.close();
    await until("the room to be empty", async () => (await (await p.get("/")).text()) === "rooms: 1\nclients: 0\n", SOON_MS);
    clock.advance(10_500);
    expect(await ended).toBe("drained");
  });
  test("answers the leave of the last member before it ends", async () => {
    await using p = await party(0);
    void p.relay.drain();
    await p.host.next();
    expect(await p.host.ask({ type: "leave" })).toEqual({ type: "left", room: p.room });
    expect(await p.host.closed).toEqual({ code: 1012, reason: "restarting" });
  });
  test("IDLE_EXIT_SECONDS: ends after so long with no socket and no room", async () => {
    const clock = new TestClock();
    await using p = await party(0, { clock, idleExitSeconds: 10 });
    clock.advance(11_000);
    await p.host.close();
    clock.advance(9_999);
    expect((await p.get("/health")).status).toBe(200);
    clock.advance(1);
    expect(await p.relay.ended).toBe("idle");
  });
  test("a create in a drain is refused before it makes place: it costs no lingering room", async () => {
    const clock = new TestClock();
    await using p = await party(0, { clock, maxRooms: 1 }, { linger: 300 });
    await p.host.close();
    const late = await p.open();
    await until("the room to be empty", async () => (await (await p.get("/")).text()) === "rooms: 1\nclients: 0\n", SOON_MS);
    void p.relay.drain();
    await late.next();
    expect(await late.ask({ type: "create", clientId: "a", maxClients: 2 })).toEqual(error("Server draining", "draining"));
    expect((await p.get(`/room/${p.room}`)).status).toBe(200);
  });
  test("a create in a drain by who is in a room is refused for that", async () => {
    await using p = await party(0, { clock: new TestClock() });
    void p.relay.drain();
    await p.host.next();
    expect(await p.host.ask({ type: "create", clientId: "a", maxClients: 2 })).toMatchObject({ code: "already_in_room" });
  });
  test("closes rooms in the last five seconds of a long drain", async () => {
    const clock = new TestClock();
    await using relay = testRelay({ clock, drainSeconds: 16 });
    for (let n = 0; n < 5; n++) await (await Client.open(relay.url)).create();
    void relay.drain();
    const rooms = async () => (await (await fetch(relay.url)).text()).split("\n")[0];
    clock.advance(11_900);
    expect(await rooms()).toBe("rooms: 5");
    clock.advance(120);
    expect(await rooms()).toBe("rooms: 4");
  });
  test("IDLE_EXIT_SECONDS: a socket keeps it running without a room", async () => {
    const clock = new TestClock();
    await using relay = testRelay({ clock, idleExitSeconds: 10 });
    const roomless = await Client.open(relay.url);
    clock.advance(11_000);
    expect(await roomless.create()).toHaveLength(6);
  });
  test("IDLE_EXIT_SECONDS: begins when the last room that lingered is over", async () => {
    const clock = new TestClock();
    await using p = await party(0, { clock, idleExitSeconds: 10 }, { linger: 30 });
    await p.host.close();
    await until("the room to be empty", async () => (await (await p.get("/")).text()) === "rooms: 1\nclients: 0\n", SOON_MS);
    clock.advance(39_999);
    expect((await p.get("/health")).status).toBe(200);
    clock.advance(1);
    expect(await p.relay.ended).toBe("idle");
  });
  test("lets go of the port, so that a program that embeds it can start another", async () => {
    const relay = testRelay();
    await relay.drain();
    await using again = testRelay({ port: relay.port });
    expect((await fetch(`${again.url}/health`)).status).toBe(200);
  });
});

describe("room codes", () => {
  test("are 35 bits in base58, and name their region in the top five", () => {
    expect(encodeCode(0)).toBe("111111");
    expect(encodeCode(2 ** 35 - 1)).toBe("uMFe9C");
    for (const region of REGIONS) for (let i = 0; i < 20; i++) expect(regionOf(newCode(region))).toBe(region);
    expect(regionOf(encodeCode(31 * 2 ** 30))).toBeUndefined();
    expect(regionOf("zzzzzz")).toBeUndefined();
    for (const code of ["", "12345", "1234567", "12345O", "12345l", "%%%%%%"]) expect(regionOf(code)).toBeUndefined();
  });
  test("don't repeat and use every row if no region is set", () => {
    const codes = Array.from({ length: 2000 }, () => newCode(undefined));
    expect(new Set(codes).size).toBe(2000);
    expect(new Set(codes.map(regionOf)).size).toBe(REGIONS.length + 1);
  });
  test("the table is append-only: 18 rows in their places", () => {
    expect(REGIONS.join(" ")).toBe("ams arn bom cdg dfw ewr fra gru iad jnb lax lhr nrt ord sin sjc syd yyz");
    expect(REGIONS.length).toBeLessThanOrEqual(32); // what five bits can name
  });
  test("have 30 random bits below the region's", () => {
    // Those of the first row are below 2^30, which is 1.6 times what a first character stands for.
    const first = Array.from({ length: 300 }, () => newCode("ams").charAt(0));
    expect(new Set(first)).toEqual(new Set(["1", "2"]));
  });
});

describe("route", () => {
  const none: Siblings = { list: () => Promise.resolve([]), has: () => Promise.resolve(false) };
  const onFly = { cluster: flyCluster("fra", none), instance: "me" };
  const withoutRegion = { cluster: flyCluster(undefined, none), instance: "me" };
  const behindNginx = { cluster: nginxCluster(new Set(["me", "peer.1"]), none), instance: "me" };
  const alone = { cluster: undefined, instance: "me" };
  const here = newCode("fra");
  const away = newCode("iad");
  const nowhere = encodeCode(31 * 2 ** 30 + 5);
  const local = newCode("fra");
  const plain: Incoming = { path: "/", query: "", upgrade: false, replayed: false, failed: false, probe: false };
  const back = { replayed: true, failed: true };
  const cases: [string, Partial<Incoming>, Route, Pick<Config, "cluster" | "instance">?][] = [
    ["nothing asked", {}, "here"],
    ["a pin to another", { query: "?instance=other" }, { instance: "other" }],
    ["a pin to this one", { query: "?instance=me" }, "here"],
    ["a pin among others", { query: "?a=1&instance=o-_9&b=2" }, { instance: "o-_9" }],
    ["a pin of 64", { query: `?instance=${"a".repeat(64)}` }, { instance: "a".repeat(64) }],
    ["a pin of 65", { query: `?instance=${"a".repeat(65)}` }, "here"],
    ["a pin whose name is encoded", { query: "?a&%69%6Esta%6ece=other" }, { instance: "other" }],
    [
      "parts that are no pin",
      { query: "?INSTANCE=other&instance%20=other&%2569nstance=other&instances=other&xinstance=other" },
      "here",
    ],
    ["a pin that widens the header", { query: "?instance=a;app=other" }, "here"],
    ["a pin with an encoded semicolon", { query: "?instance=a%3Bapp%3Dother" }, "here"],
    ["a pin with a line break", { query: "?instance=a%0d%0ax" }, "here"],
    ["a pin with a trailing line break", { query: "?instance=a%0a" }, "here"],
    ["an empty pin", { query: "?instance=" }, "here"],
    ["a pin for health", { path: "/health", query: "?instance=other" }, { instance: "other" }],
    ["a replayed pin", { path: "/x", query: "?instance=other", replayed: true }, { redirect: "/x" }],
    [
      "a replayed pin keeps the rest",
      { path: "/x", query: "?a=%20b&instance=other&c=+&%69nstance=x&instance", replayed: true },
      { redirect: "/x?a=%20b&c=+" },
    ],
    ["a failed pin", { path: "//evil.example", query: "?instance=other", ...back }, { redirect: "/evil.example" }],
    [
      "a failed pin with backslashes",
      { path: "/\\/\\evil.example", query: "?instance=other", ...back },
      { redirect: "/evil.example" },
    ],
    [
      "a stale pin with what no header can have",
      { path: "/中", query: "?é\ud800&instance=other", ...back },
      { redirect: "/%E4%B8%AD?%C3%A9%EF%BF%BD" },
    ],
    ["a replayed pin that upgrades", { query: "?instance=other", replayed: true, upgrade: true }, "here"],
    ["health", { path: "/health" }, "here"],
    ["a code of this region that is here", { path: `/room/${local}` }, "here"],
    ["a code of this region that isn't", { path: `/room/${here}` }, { searchSiblings: here }],
    ["the same as an upgrade", { path: `/${here}`, upgrade: true }, { searchSiblings: here }],
    ["a code of another region", { path: `/room/${away}` }, { region: "iad" }],
    ["the same as an upgrade", { path: `/${away}`, upgrade: true }, { region: "iad" }],
    ["a code of another region, replayed", { path: `/room/${away}`, replayed: true }, "here"],
    ["a code of this region, replayed", { path: `/room/${here}`, replayed: true }, { searchSiblings: here }],
    ["a code of this region, failed", { path: `/room/${here}`, ...back }, "here"],
    ["a code that names no row", { path: `/room/${nowhere}` }, "here"],
    ["a sibling's question", { path: `/room/${here}`, probe: true }, "here"],
    ["a sibling's question about another region", { path: `/room/${away}`, probe: true }, "here"],
    ["a sibling's question with a pin", { path: `/room/${away}`, query: "?instance=other", probe: true }, "here"],
    ["something longer", { path: `/${away}/x` }, "here"],
    ["alone a pin", { query: "?instance=other" }, "here", alone],
    ["alone a code", { path: `/room/${away}` }, "here", alone],
    ["without a region a code", { path: `/room/${away}` }, "here", withoutRegion],
    ["without a region a pin", { query: "?instance=other" }, { instance: "other" }, withoutRegion],
    ["behind nginx a pin to a peer", { query: "?instance=peer.1" }, { instance: "peer.1" }, behindNginx],
    ["behind nginx a pin to nobody", { query: "?instance=peer-2" }, "here", behindNginx],
    ["behind nginx a pin with a path", { query: "?instance=../room" }, "here", behindNginx],
    ["behind nginx a stale pin", { path: "/x", query: "?instance=peer.1", ...back }, { redirect: "/x" }, behindNginx],
    ["behind nginx any code that isn't here", { path: `/room/${nowhere}` }, { searchSiblings: nowhere }, behindNginx],
    ["behind nginx the same as an upgrade", { path: `/${away}`, upgrade: true }, { searchSiblings: away }, behindNginx],
    ["behind nginx a code that is here", { path: `/room/${local}` }, "here", behindNginx],
    ["behind nginx a code, failed", { path: `/room/${away}`, ...back }, "here", behindNginx],
    ["behind nginx a peer's question", { path: `/room/${away}`, probe: true }, "here", behindNginx],
    ["behind nginx what is no code", { path: "/robots.txt" }, "here", behindNginx],
  ];
  for (const [what, incoming, decision, config] of cases)
    test(`${what}: ${JSON.stringify(decision).slice(0, 60)}`, () => {
      expect(route({ ...plain, ...incoming }, config ?? onFly, (code) => code === local)).toEqual(decision);
    });
});

describe("siblings", () => {
  const fly = (siblings: Siblings): Partial<Config> => ({
    cluster: flyCluster("fra", siblings),
    codeRegion: "fra",
    instance: "me",
    region: "fra",
    addressHeader: "Fly-Client-IP",
  });
  /** Siblings that answer as told, and remember what they were asked. */
  function stub(answers: Record<string, boolean | "silent" | "broken">) {
    const asked: string[] = [];
    const siblings: Siblings = {
      list: () => Promise.resolve(Object.keys(answers)),
      has(id, code, signal) {
        asked.push(`${id} ${code}`);
        const answer = answers[id];
        if (answer === "broken") return Promise.reject(new Error("refused"));
        if (answer !== "silent") return Promise.resolve(answer === true);
        return new Promise((_, reject) => signal.addEventListener("abort", () => reject(new Error("aborted"))));
      },
    };
    return { asked, siblings };
  }
  const look = (url: string, path: string, headers: Record<string, string> = {}) =>
    fetch(url + path, { redirect: "manual", headers: { "Fly-Client-IP": "1.1.1.1", ...headers } });

  test("a room of a sibling is replayed to it, though another is silent", async () => {
    const { siblings } = stub({ a: false, b: "silent", c: true });
    await using relay = testRelay({ ...fly(siblings) });
    const answer = await look(relay.url, `/room/${newCode("fra")}`);
    expect([answer.status, answer.headers.get("fly-replay")]).toEqual([409, "instance=c;timeout=5s;fallback=force_self"]);
    expect(answer.headers.get("access-control-allow-origin")).toBe("*");
  });
  test("a code of another region is replayed there", async () => {
    await using relay = testRelay({ ...fly(stub({}).siblings) });
    const answer = await look(relay.url, `/room/${newCode("iad")}`);
    expect([answer.status, answer.headers.get("fly-replay")]).toEqual([409, "region=iad;timeout=5s;fallback=force_self"]);
  });
  test("OPTIONS is never replayed, and POST is 405", async () => {
    await using relay = testRelay({ ...fly(stub({}).siblings) });
    for (const [method, status] of [
      ["OPTIONS", 204],
      ["POST", 405],
    ] as const) {
      const answer = await fetch(`${relay.url}/room/${newCode("iad")}?instance=x`, { method });
      expect([answer.status, answer.headers.get("fly-replay")]).toEqual([status, null]);
    }
  });
  test("a miss that all confirmed is remembered for 2 s; the same code at once is asked once", async () => {
    const clock = new TestClock();
    const { asked, siblings } = stub({ a: false, b: false });
    await using relay = testRelay({ ...fly(siblings), clock });
    const code = newCode("fra");
    const answers = await Promise.all(Array.from({ length: 5 }, () => look(relay.url, `/room/${code}`)));
    expect(answers.map((a) => a.status)).toEqual([404, 404, 404, 404, 404]);
    expect(asked).toEqual([`a ${code}`, `b ${code}`]);
    clock.advance(2_001);
    await look(relay.url, `/room/${code}`);
    expect(asked).toHaveLength(4);
  });
  test("a miss that one didn't confirm is not remembered", async () => {
    const { asked, siblings } = stub({ a: false, b: "broken" });
    await using relay = testRelay({ ...fly(siblings) });
    const code = newCode("fra");
    for (let i = 1; i <= 2; i++) {
      expect((await look(relay.url, `/room/${code}`)).status).toBe(404);
      expect(asked).toHaveLength(2 * i);
    }
  });
  test("a silent sibling, or DNS that hangs, costs one second", async () => {
    const hung: Siblings = { list: () => new Promise(() => {}), has: () => Promise.resolve(true) };
    for (const siblings of [stub({ a: "silent" }).siblings, hung]) {
      const clock = new TestClock();
      await using relay = testRelay({ ...fly(siblings), clock });
      const before = clock.pending;
      const answer = look(relay.url, `/room/${newCode("fra")}`);
      await until("the search to begin", () => clock.pending > before, SOON_MS);
      clock.advance(1_000);
      expect((await answer).status).toBe(404);
      expect(clock.pending).toBe(before);
      const failed = siblings === hung ? 0 : 1; // there nobody could be asked
      expect((await readMetric(relay.url, "party_sockets_probes_total")).failed).toBe(failed);
    }
  });
  test("siblings that were silent for hundreds of searches are asked on, and found when they speak", async () => {
    const wanted = newCode("fra");
    const { siblings: silent } = stub({ a: "silent", b: "silent", c: "silent", d: "silent" }); // 4 x 64: more than are asked at once
    const siblings: Siblings = {
      ...silent,
      has: (id, code, signal) => (code === wanted ? Promise.resolve(id === "d") : silent.has(id, code, signal)),
    };
    const clock = new TestClock();
    await using relay = testRelay({ ...fly(siblings), clock });
    const before = clock.pending;
    const answers = Array.from({ length: 64 }, (_, i) =>
      look(relay.url, `/room/${newCode("fra")}`, { "Fly-Client-IP": `1.1.1.${i % 8}` }),
    );
    await until("64 searches to begin", () => clock.pending >= before + 64, SOON_MS);
    clock.advance(1_000);
    for (const answer of await Promise.all(answers)) expect(answer.status).toBe(404);
    expect((await look(relay.url, `/room/${wanted}`)).headers.get("fly-replay")).toStartWith("instance=d;");
  });
  test("at most 8 searches for an address and 64 in all; who gets none is told 503", async () => {
    const { siblings } = stub({ a: "silent" });
    const clock = new TestClock();
    await using relay = testRelay({ ...fly(siblings), clock });
    const before = clock.pending;
    const waiting: Promise<Response>[] = [];
    for (let address = 1; address <= 8; address++)
      for (let i = 0; i < 8; i++)
        waiting.push(look(relay.url, `/room/${newCode("fra")}`, { "Fly-Client-IP": `1.1.1.${address}` }));
    await until("64 searches to begin", () => clock.pending >= before + 64, SOON_MS);
    for (const address of ["1.1.1.1", "2.2.2.2"]) {
      const busy = await look(relay.url, `/room/${newCode("fra")}`, { "Fly-Client-IP": address });
      expect([busy.status, busy.headers.get("retry-after")]).toEqual([503, "1"]);
    }
    clock.advance(1_000);
    expect((await Promise.all(waiting)).map((a) => a.status)).toEqual(Array(64).fill(404));
  });
  test("a peer's name that hangs is looked up once for all who wait for it", async () => {
    const { promise: hung, reject } = Promise.withResolvers<never>();
    using lookUp = spyOn(Bun.dns, "lookup").mockReturnValue(hung);
    const { cluster } = configFromEnv({ PEERS: "a,b", INSTANCE_ID: "a", HOST: "127.0.0.1", PEER_ADDRESS: "{id}.relay:3000" });
    const clock = new TestClock();
    await using relay = testRelay({ cluster, clock });
    const status = async () => (await fetch(`${relay.url}/room/${newCode(undefined)}`)).status;
    const before = clock.pending;
    for (const _ of [1, 2]) {
      const answers = [1, 2, 3].map(status);
      await until("3 searches to begin", () => clock.pending >= before + 3, SOON_MS);
      clock.advance(1_000);
      expect(await Promise.all(answers)).toEqual([404, 404, 404]);
    }
    expect(lookUp).toHaveBeenCalledTimes(1);
    reject(new Error("timed out"));
    await hung.catch(() => {});
    expect(await status()).toBe(404);
    expect(lookUp).toHaveBeenCalledTimes(2);
  });
  test("a sibling's question is answered from here, asks nobody and counts no miss", async () => {
    const { asked, siblings } = stub({ a: true });
    await using relay = testRelay({ ...fly(siblings), maxMissesPerMinute: 1 });
    for (let i = 0; i < 5; i++)
      expect((await fetch(`${relay.url}/room/${newCode("fra")}`, { headers: { "X-Party-Probe": "1" } })).status).toBe(404);
    expect(asked).toEqual([]);
    await look(relay.url, `/room/${newCode("fra")}`, { "X-Party-Probe": "1" }); // with an address it is a client's
    expect(asked).toHaveLength(1);
  });
  test("a sibling's question counts no miss as an upgrade, either", async () => {
    await using relay = testRelay({ ...fly(stub({ a: true }).siblings), maxMissesPerMinute: 1 });
    for (let i = 0; i < 3; i++) await Client.open(`${relay.url}/${newCode("fra")}`, { "X-Party-Probe": "1" });
    expect(await (await Client.open(relay.url)).join("zzzzzz", "b")).toMatchObject({ code: "room_not_found" });
  });
  test("a code that is nowhere counts as a miss if a path asks for it, too, and over the limit isn't searched", async () => {
    const { asked, siblings } = stub({ a: false });
    await using relay = testRelay({ ...fly(siblings), maxMissesPerMinute: 1 });
    expect((await look(relay.url, `/${newCode("fra")}`)).status).toBe(200);
    for (const path of [`/${newCode("fra")}`, `/room/${newCode("fra")}`]) expect((await look(relay.url, path)).status).toBe(429);
    expect(asked).toHaveLength(1);
    expect((await look(relay.url, "/")).status).toBe(200);
  });
  test("over the limit a path tells nothing of the rooms that are here, and known clientIds come back by it", async () => {
    await using relay = testRelay({ ...fly(stub({ a: false }).siblings), maxMissesPerMinute: 1 });
    const from = { "Fly-Client-IP": "1.1.1.1" };
    const host = await Client.open(relay.url, from);
    const room = await host.create();
    await host.close();
    const again = await Client.open(relay.url, from);
    const code = await again.create(8, "a", { linger: 300 });
    await again.close();
    await look(relay.url, `/${newCode("fra")}`);
    for (const gone of [room, code]) expect((await look(relay.url, `/${gone}`)).status).toBe(429);
    expect(await (await Client.open(`${relay.url}/${code}`, from)).join(code, "a")).toMatchObject({ resumed: true });
  });
  test("an upgrade by a code that is nowhere counts with the sockets; over their limit it is taken unsearched", async () => {
    const { asked, siblings } = stub({ a: false });
    await using relay = testRelay({ ...fly(siblings), maxMissesPerMinute: 3 });
    const from = { "Fly-Client-IP": "1.1.1.1" };
    const code = newCode("fra");
    const guest = await Client.open(`${relay.url}/${code}`, from);
    for (let i = 0; i < 2; i++) expect(await guest.join(code, "b")).toMatchObject({ code: "room_not_found" });
    expect(await guest.join(code, "b")).toMatchObject({ code: "too_many_attempts" });
    for (let i = 0; i < 5; i++) await (await Client.open(`${relay.url}/${newCode("fra")}`, from)).close();
    expect(asked).toHaveLength(1);
    expect((await look(relay.url, `/room/${newCode("fra")}`)).status).toBe(404); // look-ups are counted apart
  });
  test("an upgrade that is refused counts as the search that it cost", async () => {
    const { asked, siblings } = stub({ a: false });
    await using relay = testRelay({ ...fly(siblings), maxMissesPerMinute: 3, allowedOrigins: new Set(["https://game.example"]) });
    const refused = { Upgrade: "websocket", Connection: "Upgrade", Origin: "https://other.example" };
    for (let i = 0; i < 5; i++) expect((await look(relay.url, `/${newCode("fra")}`, refused)).status).toBe(403);
    expect(asked).toHaveLength(3);
  });
  test("a look-up that gets no search counts as a miss", async () => {
    const { siblings } = stub({ a: "silent" });
    const clock = new TestClock();
    await using relay = testRelay({ ...fly(siblings), clock, maxMissesPerMinute: 5 });
    const before = clock.pending;
    const searching = Array.from({ length: 8 }, () => look(relay.url, `/room/${newCode("fra")}`));
    await until("8 searches to begin", () => clock.pending >= before + 8, SOON_MS);
    const statuses: number[] = [];
    for (let i = 0; i < 7; i++) statuses.push((await look(relay.url, `/room/${newCode("fra")}`)).status);
    expect(statuses).toEqual([503, 503, 503, 503, 503, 429, 429]);
    clock.advance(1_000);
    await Promise.all(searching);
  });
  test("an upgrade with a stale pin is taken here, and its join says Room not found", async () => {
    await using relay = testRelay({ ...fly(stub({}).siblings) });
    const guest = await Client.open(`${relay.url}/?instance=gone`, {
      "fly-replay-failed": "instance=gone;reason=timeout",
    });
    expect(await guest.join("zzzzzz", "b")).toMatchObject({ code: "room_not_found" });
  });
  test("machines are read from TXT records that were cut at 255 bytes", () => {
    const all = Array.from({ length: 20 }, (_, i) => `${String(i).padStart(14, "a")} fra`);
    const text = all.join(",");
    const cut = [text.slice(0, 255), text.slice(255)];
    expect(parseMachines(cut).map((m) => `${m.id} ${m.region}`)).toEqual(all);
    expect(parseMachines(["a fra", "b iad,c fra", "", "broken", "x;app=y fra"])).toEqual([
      { id: "a", region: "fra" },
      { id: "b", region: "iad" },
      { id: "c", region: "fra" },
    ]);
  });
  test("at most 200 are asked at once; the others have their turn when those have answered", async () => {
    const waiting: (() => void)[] = [];
    let most = 0;
    const siblings: Siblings = {
      list: () => Promise.resolve(Array.from({ length: 30 }, (_, i) => `m${i}`)),
      async has() {
        await new Promise<void>((resolve) => (most = Math.max(most, waiting.push(resolve))));
        return false;
      },
    };
    await using relay = testRelay({ ...fly(siblings), clock: new TestClock() });
    const looks = Array.from({ length: 8 }, () => look(relay.url, `/room/${newCode("fra")}`));
    for (const next of [200, 40]) {
      await until(`${next} requests`, () => waiting.length >= next, SOON_MS);
      for (const answer of waiting.splice(0)) answer();
    }
    for (const answer of await Promise.all(looks)) expect(answer.status).toBe(404);
    expect(most).toBe(200);
  });
  test("an upgrade that gets no search counts with the sockets", async () => {
    const { siblings } = stub({ a: "silent" });
    const clock = new TestClock();
    await using relay = testRelay({ ...fly(siblings), clock, maxMissesPerMinute: 3 });
    const guest = await Client.open(relay.url, { "Fly-Client-IP": "1.1.1.1" });
    const before = clock.pending;
    const searching = Array.from({ length: 8 }, () => look(relay.url, `/room/${newCode("fra")}`));
    await until("8 searches to begin", () => clock.pending >= before + 8, SOON_MS);
    const upgrade = { Upgrade: "websocket", Connection: "Upgrade" };
    for (let i = 0; i < 3; i++) expect((await look(relay.url, `/${newCode("fra")}`, upgrade)).status).toBe(503);
    expect(await guest.join("zzzzzz", "b")).toMatchObject({ code: "too_many_attempts" });
    expect((await look(relay.url, `/room/${newCode("fra")}`)).status).toBe(503); // look-ups are counted apart
    clock.advance(1_000);
    await Promise.all(searching);
  });
});

describe("behind nginx", () => {
  /** A relay with one peer, which answers as told. */
  async function pair(status: () => number) {
    const asked: (string | null)[] = [];
    const peer = Bun.serve({
      port: 0,
      hostname: "127.0.0.1",
      fetch({ headers }) {
        asked.push(headers.get("x-party-probe"));
        return new Response("", { status: status() });
      },
    });
    const id = `${peer.port}`;
    const env = { PEERS: `1,${id}`, INSTANCE_ID: "1", HOST: "127.0.0.1", PEER_ADDRESS: "127.0.0.1:{id}" };
    const { cluster, instance } = configFromEnv(env);
    const clock = new TestClock();
    const relay = testRelay({ cluster, instance, clock });
    return {
      ...{ asked, id, relay, clock },
      get: (path: string) => fetch(relay.url + path, { redirect: "manual" }),
      upgrade: async (path: string) => {
        const raw = await RawSocket.connect(relay.url);
        raw.write(handshake(path));
        return Number((await raw.head()).split(" ")[1]);
      },
      async [Symbol.asyncDispose]() {
        await relay[Symbol.asyncDispose]();
        await peer.stop(true);
      },
    };
  }

  test("a peer is asked as a peer, once, and nobody else is", async () => {
    await using at = await pair(() => 404);
    const code = newCode(undefined);
    for (let i = 0; i < 2; i++) expect((await at.get(`/room/${code}`)).status).toBe(404);
    expect(at.asked).toEqual(["1"]);
    expect(await readMetric(at.relay.url, "party_sockets_probes_total")).toEqual({ found: 0, missing: 1, failed: 0 });
  });
  test("a peer that answers neither yes nor no hasn't said that the room isn't there", async () => {
    let status = 503;
    await using at = await pair(() => status);
    const code = newCode(undefined);
    expect((await at.get(`/room/${code}`)).status).toBe(404);
    expect(await readMetric(at.relay.url, "party_sockets_probes_total")).toEqual({ found: 0, missing: 0, failed: 1 });
    status = 200;
    expect((await at.get(`/room/${code}`)).headers.get("x-accel-redirect")).toBe(`/@relay/${at.id}`);
  });
  test("a replay says where to, and can be read across origins", async () => {
    await using at = await pair(() => 200);
    for (const path of [`/?instance=${at.id}`, `/room/${newCode(undefined)}`]) {
      const { status, headers } = await at.get(path);
      expect([status, headers.get("x-accel-redirect")]).toEqual([200, `/@relay/${at.id}`]);
      expect(headers.get("access-control-allow-origin")).toBe("*");
    }
  });
  test("a draining relay sends on who asks for no room and no machine, and takes who does", async () => {
    await using at = await pair(() => 404);
    const room = await (await Client.open(at.relay.url)).create();
    void at.relay.drain();
    for (const path of ["/", "/x", "/room/x", "/?instance=nobody"]) expect([path, await at.upgrade(path)]).toEqual([path, 503]);
    for (const path of [`/${room}`, `/room/${room}`, "/?instance=1", `/${newCode(undefined)}`])
      await (await Client.open(at.relay.url + path)).close(); // which throws if the upgrade is refused
    expect((await at.get("/health")).status).toBe(200);
  });
});

describe("configuration", () => {
  const fault = (env: Record<string, string>): string => {
    try {
      configFromEnv(env);
    } catch (thrown) {
      if (thrown instanceof ConfigError) return thrown.message;
      throw thrown;
    }
    return "";
  };
  test("has the defaults that the README lists", () => {
    expect(configFromEnv({})).toMatchObject({
      port: 3000,
      instance: "",
      region: "",
      maxMessageBytes: 262144,
      maxMessagesPerSecond: 200,
      maxBufferedBytes: 1048576,
      maxClientsPerRoom: 1000,
      maxRooms: 10000,
      maxConnections: 10000,
      maxMissesPerMinute: 600,
      defaultLingerSeconds: 0,
      defaultHostGraceSeconds: 0,
      drainSeconds: 8,
      idleExitSeconds: 0,
      dashboardUrl: undefined,
      addressHeader: undefined,
    });
  });
  const peers = { PEERS: "a,b", INSTANCE_ID: "a", HOST: "127.0.0.1" };
  const wrong: [Record<string, string>, RegExp][] = [
    ...[
      "PORT",
      "MAX_MESSAGE_BYTES",
      "MAX_MESSAGES_PER_SECOND",
      "MAX_BUFFERED_BYTES",
      "MAX_MEMORY_BYTES",
      "DEFAULT_LINGER_SECONDS",
      "DEFAULT_HOST_GRACE_SECONDS",
      "MAX_CLIENTS_PER_ROOM",
      "MAX_ROOMS",
      "MAX_CONNECTIONS",
      "MAX_MISSES_PER_MINUTE",
      "DRAIN_SECONDS",
      "IDLE_EXIT_SECONDS",
    ].map((name): [Record<string, string>, RegExp] => [
      { [name]: "3000x" },
      new RegExp(`^${name} must be a whole number from 0 to \\d+, not "3000x"$`),
    ]),
    [{ PORT: "70000" }, /^PORT must be a whole number from 0 to 65535, not "70000"$/],
    [{ PORT: "-1" }, /PORT/],
    [{ PORT: "1.5" }, /PORT/],
    [{ MAX_ROOMS: "1e3" }, /MAX_ROOMS/],
    [{ DEFAULT_LINGER_SECONDS: "301" }, /^DEFAULT_LINGER_SECONDS must be a whole number from 0 to 300, not "301"$/],
    [{ DEFAULT_HOST_GRACE_SECONDS: "3601" }, /^DEFAULT_HOST_GRACE_SECONDS must be a whole number from 0 to 3600, not "3601"$/],
    [{ ...peers, INSTANCE_ID: "c" }, /^INSTANCE_ID must be one of PEERS, not "c"$/],
    [{ PEERS: "a,b", INSTANCE_ID: "a" }, /^HOST must be set/],
    [{ ...peers, PEERS: "a,b/c" }, /^PEERS must list ids .* not "b\/c"$/],
    [{ ...peers, PEERS: "a,,b" }, /^PEERS must list ids .* not ""$/],
    [
      { ...peers, PEERS: Array.from({ length: 65 }, (_, i) => (i === 0 ? "a" : `p${i}`)).join() },
      /^PEERS must list at most 64 ids, not 65$/,
    ],
    [{ ...peers, FLY_APP_NAME: "x", FLY_MACHINE_ID: "a" }, /^PEERS must be left out if FLY_APP_NAME is set/],
    [{ ...peers, PEER_ADDRESS: "relay:3000" }, /^PEER_ADDRESS must be a host and port with {id} in it/],
    ...[
      "{id}:3000/x",
      "{id}:3000#x",
      "x@{id}:3000",
      "//{id}:3000",
      "{id},x:3000",
      "{id}{x}:3000",
      "{id}:0",
      "{id}:70000",
      "127.0.0.1:{id}",
    ].map((PEER_ADDRESS): [Record<string, string>, RegExp] => [{ ...peers, PEER_ADDRESS }, /^PEER_ADDRESS must give [^\n]*$/]),
    [{ ...peers, PEERS: "4501,4502", INSTANCE_ID: "4501" }, /^PEER_ADDRESS must .* "{id}:3000" gives "4501:3000"$/], // a number is no host
    [{ ...peers, PORT: "0" }, /^PORT must be set/],
    [{ MAX_BUFFERED_BYTES: "1000000" }, /^MAX_BUFFERED_BYTES must be at least four times MAX_MESSAGE_BYTES/],
    [{ FLY_REGION: "xyz" }, /append "xyz" to regions.ts/],
    [{ FLY_APP_NAME: "a", FLY_MACHINE_ID: "m1", INSTANCE_ID: "m2" }, /INSTANCE_ID/],
    [{ INSTANCE_ID: "a\nb" }, /INSTANCE_ID/],
    [{ DASHBOARD_URL: "javascript:alert(1)" }, /DASHBOARD_URL/],
    [{ ADDRESS_HEADER: "a b" }, /ADDRESS_HEADER/],
    [{ LOG_FORMAT: "xml" }, /LOG_FORMAT/],
    [{ ALLOWED_ORIGINS: "https://a.example,game.example" }, /^ALLOWED_ORIGINS .* not "game.example"$/],
    ...["*", ",", "https://*.example", "https://game.example/play", "https://exa%mple"].map(
      (ALLOWED_ORIGINS): [Record<string, string>, RegExp] => [{ ALLOWED_ORIGINS }, /^ALLOWED_ORIGINS must list origins [^\n]*$/],
    ),
    [{ MAX_MEMORY_BYTES: "9007199254740992" }, /^MAX_MEMORY_BYTES must be a whole number from 0 to 9007199254740991, not/],
    [{ PORT: "x", MAX_ROOMS: "y" }, /PORT.*\nMAX_ROOMS/],
  ];
  for (const [env, message] of wrong)
    test(`says what is wrong with ${JSON.stringify(env)}`, () => expect(fault(env)).toMatch(message));
  test("takes the largest number that it names", () =>
    expect(configFromEnv({ MAX_MEMORY_BYTES: "9007199254740991" }).maxMemoryBytes).toBe(9007199254740991));
  test("takes 0 as unlimited, and then has no quarrel between the two sizes", () => {
    expect(fault({ MAX_MESSAGE_BYTES: "0" })).toBe("");
    expect(fault({ MAX_BUFFERED_BYTES: "0" })).toBe("");
  });
  test("knows the variables of a cluster behind nginx", () => {
    expect(configFromEnv(peers)).toMatchObject({ instance: "a", host: "127.0.0.1", addressHeader: "X-Forwarded-For" });
    expect(configFromEnv({ ...peers, ADDRESS_HEADER: "X-Real-IP" }).addressHeader).toBe("X-Real-IP");
  });
  test("knows Fly.io's variables", () => {
    expect(configFromEnv({ FLY_APP_NAME: "a", FLY_MACHINE_ID: "m1", FLY_REGION: "fra" })).toMatchObject({
      instance: "m1",
      region: "fra",
      addressHeader: "Fly-Client-IP",
      dashboardUrl: "https://fly-metrics.net/d/fly-app/fly-app?var-app=a",
    });
  });

  const run = (env: Record<string, string>) =>
    Bun.spawn([process.execPath, "run", "server.ts"], {
      cwd: import.meta.dir,
      env: { PATH: process.env.PATH ?? "", ...env },
      stdout: "pipe",
      stderr: "pipe",
    });
  test("`bun run server.ts` ends with a message if a variable is wrong, or the port is taken", async () => {
    const bad = run({ PORT: "abc" });
    expect([await bad.exited, await new Response(bad.stderr).text()]).toEqual([
      1,
      'PORT must be a whole number from 0 to 65535, not "abc"\n',
    ]);
    await using relay = testRelay();
    const taken = run({ PORT: String(relay.port) });
    expect([await taken.exited, await new Response(taken.stderr).text()]).toEqual([
      1,
      `Port ${relay.port} is in use: set PORT to another\n`,
    ]);
  });
  test("has the defaults that no variable sets", () => {
    expect(configFromEnv({})).toMatchObject({ knownPerRoom: 1_000, knownInAll: 100_000, metricsMs: 1_000 });
    const half = Math.floor(process.constrainedMemory() / 2);
    expect(configFromEnv({}).maxMemoryBytes).toBe(Math.max(96 * 1024 * 1024, half));
  });
  test("writes the log as JSON if it is told to", () => {
    using print = spyOn(console, "log").mockImplementation(() => {});
    configFromEnv({ LOG_FORMAT: "json" }).log("cap reached", { cap: "rooms" });
    const [line] = print.mock.calls[0] as [string];
    expect(JSON.parse(line)).toEqual({ time: expect.any(String), event: "cap reached", cap: "rooms" });
  });
  test("takes no time that a timer can't count", () => {
    for (const name of ["DRAIN_SECONDS", "IDLE_EXIT_SECONDS"]) {
      expect(fault({ [name]: "2147483" })).toBe("");
      expect(fault({ [name]: "2147484" })).toMatch(/from 0 to 2147483, not/);
    }
  });
  test("takes 64 peers", () => {
    const ids = Array.from({ length: 64 }, (_, i) => `p${i}`);
    expect(configFromEnv({ ...peers, PEERS: ids.join(), INSTANCE_ID: "p0" }).cluster?.isMachine("p63")).toBe(true);
  });
  test("takes ids of 64 characters as peers, spaced or not", () => {
    const id = "a".repeat(64);
    expect(configFromEnv({ ...peers, PEERS: `${id}, b`, INSTANCE_ID: "b" }).cluster?.isMachine(id)).toBe(true);
    expect(fault({ ...peers, PEERS: `a,${id}a` })).toMatch(/^PEERS must list ids/);
  });
  test("routes by region on Fly.io; what the operator sets comes before Fly.io's", () => {
    const env = { FLY_APP_NAME: "a", FLY_MACHINE_ID: "m1", FLY_REGION: "fra" };
    expect(configFromEnv(env)).toMatchObject({ codeRegion: "fra", cluster: { region: "fra" } });
    const own = { REGION: "eu", DASHBOARD_URL: "https://stats.example/", ADDRESS_HEADER: "X-Real-IP" };
    expect(configFromEnv({ ...env, ...own })).toMatchObject({
      region: "eu",
      codeRegion: "fra",
      dashboardUrl: "https://stats.example/",
      addressHeader: "X-Real-IP",
    });
  });
});

test("a relay that can't have its port leaves nothing that goes on", async () => {
  await using relay = testRelay();
  const clock = new TestClock();
  expect(() => testRelay({ clock, port: relay.port })).toThrow(`Port ${relay.port} is in use: set PORT to another`);
  expect(clock.pending).toBe(0);
});

test("the version is package.json's", async () => {
  const { version } = (await Bun.file(new URL("package.json", import.meta.url)).json()) as { version: string };
  expect(VERSION).toBe(version);
});

test("startRelay takes what it is told, and defaults for the rest", async () => {
  await using relay = startRelay({ port: 0, log: () => {} });
  expect(await (await Client.open(relay.url)).create()).toHaveLength(6);
});

test("two relays in one process share nothing", async () => {
  await using p = await party(0);
  await using other = testRelay();
  expect(await (await Client.open(other.url)).join(p.room, "b")).toMatchObject({ code: "room_not_found" });
  expect(await (await fetch(other.url)).text()).toBe("rooms: 0\nclients: 0\n");
});
