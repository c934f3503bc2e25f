/**
 * Black-box tests of a running relay: `LIVE_URL=https://app.fly.dev bun run test:live`. They leave nothing behind.
 *
 * The machines are LIVE_MACHINES (`id:region,…`) or LIVE_INSTANCES (`id,…`); with neither, what `fly machines list --json`
 * says of LIVE_APP, or of the app in fly.toml.
 */
import { describe, expect, test } from "bun:test";
import { Client } from "./ops/shared/client.ts";

type Machine = { id: string; region?: string };

const url = process.env.LIVE_URL?.replace(/\/+$/, "") ?? "";
const machines = url === "" ? [] : listMachines();
const timeoutMs = 30_000; // a pin to a machine that is gone costs Fly.io up to 5 s, a sleeping machine some more

function listMachines(): Machine[] {
  const { LIVE_MACHINES, LIVE_INSTANCES, LIVE_APP } = process.env;
  const listed = LIVE_MACHINES ?? LIVE_INSTANCES;
  if (listed !== undefined) {
    return listed
      .split(",")
      .filter(Boolean)
      .map((entry) => {
        const [id = "", region] = entry.trim().split(":");
        return { id, region };
      });
  }
  const fly = Bun.which("fly") ?? Bun.which("flyctl");
  if (fly === null) return [];
  const app = LIVE_APP === undefined ? [] : ["--app", LIVE_APP];
  const { exitCode, stdout } = Bun.spawnSync([fly, "machines", "list", "--json", ...app]);
  if (exitCode !== 0) return []; // not logged in, or no such app
  const all = JSON.parse(stdout.toString()) as { id: string; region: string; state: string }[];
  return all.filter(({ state }) => state === "started").map(({ id, region }) => ({ id, region }));
}

/** Makes a request arrive at one machine first, as Fly.io's proxy understands it. */
const arriveAt = ({ id }: Machine): Record<string, string> => ({ "fly-force-instance-id": id });

const gone = "00000000000000"; // an instance that no app has

/** A code that hardly any room has. */
const unknownCode = (): string =>
  `${Math.random()}`
    .replace(/[^1-9]/g, "")
    .slice(0, 6)
    .padEnd(6, "z");

async function create(path: string): Promise<{ host: Client; room: string; instance: string; region: string }> {
  const host = await Client.open(url + path);
  const created = await host.ask({ type: "create", clientId: crypto.randomUUID(), maxClients: 4 });
  expect(created).toEqual({
    type: "created",
    room: expect.stringMatching(/^[1-9A-HJ-NP-Za-km-z]{6}$/),
    instance: expect.any(String),
    region: expect.any(String),
    index: 0,
  });
  return { host, room: created.room, instance: created.instance, region: created.region };
}

describe.skipIf(url === "")("one machine (needs LIVE_URL)", () => {
  test(
    "is healthy",
    async () => {
      const answer = await fetch(`${url}/health`);
      expect(answer.status).toBe(200);
      expect(await answer.json()).toEqual({ status: "ok" });
    },
    timeoutMs,
  );

  test(
    "takes a guest who is pinned to the room's instance, relays messages, and tells who left",
    async () => {
      const { host, room, instance } = await create("/");
      const guest = await Client.open(`${url}/?instance=${instance}`);
      expect(await guest.join(room, crypto.randomUUID())).toEqual({
        type: "joined",
        room,
        index: 1,
        peers: [0],
      });
      expect(await host.next()).toEqual({ type: "peer_joined", index: 1 });
      guest.send({ type: "send", data: { tap: [1, null] } });
      expect(await host.next()).toEqual({ type: "message", from: 1, data: { tap: [1, null] } });
      host.send({ type: "send", data: "you", to: 1 });
      expect(await guest.next()).toEqual({ type: "message", from: 0, data: "you" });
      await guest.close();
      expect(await host.next()).toEqual({ type: "peer_left", index: 1 });
      await host.close();
    },
    timeoutMs,
  );

  test(
    "tells with X-Instance-Id who answered for a room, and for one that isn't there",
    async () => {
      const { host, room, instance } = await create("/");
      const found = await fetch(`${url}/room/${room}`);
      expect(found.status).toBe(200);
      expect(found.headers.get("X-Instance-Id")).toBe(instance);
      expect(await found.json()).toMatchObject({ clients: 1, maxClients: 4, origin: "unknown" });
      const missing = await fetch(`${url}/room/${unknownCode()}`);
      expect(missing.status).toBe(404);
      expect(missing.headers.get("X-Instance-Id")).not.toBeNull();
      await host.close();
    },
    timeoutMs,
  );

  test(
    "serves a socket that is pinned to an instance that is gone, without the room",
    async () => {
      const guest = await Client.open(`${url}/?instance=${gone}`);
      expect(await guest.join(unknownCode(), "guest")).toMatchObject({
        type: "error",
        message: "Room not found",
      });
      expect(await guest.ask({ type: "create", clientId: "guest", maxClients: 2 })).toMatchObject({
        index: 0,
      });
      await guest.close();
    },
    timeoutMs,
  );

  test(
    "finds a room over HTTP behind a pin to an instance that is gone",
    async () => {
      const { host, room, instance } = await create("/");
      const answer = await fetch(`${url}/room/${room}?instance=${gone}`);
      expect(answer.status).toBe(200);
      expect(answer.headers.get("X-Instance-Id")).toBe(instance);
      await host.close();
    },
    timeoutMs,
  );
});

const several = machines.length > 1 ? "" : ` (skipped: ${machines.length} known, see LIVE_MACHINES)`;
describe.skipIf(several !== "")(`several machines${several}`, () => {
  /** Looks up and joins a room of `owner` by its code alone, arriving at `entry`. */
  async function findFromEach(pairs: { owner: Machine; entry: Machine }[]): Promise<void> {
    for (const { owner, entry } of pairs) {
      const { host, room } = await create(`/?instance=${owner.id}`);
      const found = await fetch(`${url}/room/${room}`, { headers: arriveAt(entry) });
      expect(found.status).toBe(200);
      expect(found.headers.get("X-Instance-Id")).toBe(owner.id);
      const guest = await Client.open(`${url}/${room}`, arriveAt(entry));
      expect(await guest.join(room, "guest")).toMatchObject({ type: "joined", index: 1 });
      await Promise.all([guest.close(), host.close()]);
    }
  }

  const pairs = machines.flatMap((owner) => machines.map((entry) => ({ owner, entry })));
  const sameRegion = pairs.filter(({ owner, entry }) => owner.region === entry.region);
  const otherRegion = pairs.filter(({ owner, entry }) => owner.region !== entry.region);

  test(
    "reach each machine by its pin, wherever the socket arrives",
    async () => {
      for (const { owner, entry } of pairs) {
        const socket = await Client.open(`${url}/?instance=${owner.id}`, arriveAt(entry));
        const created = await socket.ask({ type: "create", clientId: "host", maxClients: 2 });
        expect(created).toMatchObject({ instance: owner.id, region: owner.region ?? expect.any(String) });
        await socket.close();
      }
    },
    timeoutMs,
  );

  test("find a code from every machine of its region", () => findFromEach(sameRegion), timeoutMs);

  test.skipIf(otherRegion.length === 0)(
    `find a code from every machine of another region${otherRegion.length > 0 ? "" : " (skipped: no second region is named)"}`,
    () => findFromEach(otherRegion),
    timeoutMs,
  );
});
