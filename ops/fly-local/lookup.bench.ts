/** What a look-up costs, by where the room is, and an unknown code by the number of siblings: `bun run ops/fly-local/lookup.bench.ts` */
import { newCode } from "../../server.ts";
import { Client } from "../testing.ts";
import { type FlyLocal, startFlyLocal } from "./start.ts";

const rounds = 50;
const env = { MAX_MISSES_PER_MINUTE: "0", DRAIN_SECONDS: "0" };

/** The median time of `rounds` requests that arrive at the first machine, one after another. Milliseconds. */
async function median(fly: FlyLocal, path: () => string): Promise<number> {
  const headers = { "fly-force-instance-id": fly.machines[0]?.id ?? "" };
  const times: number[] = [];
  for (let round = 0; round < rounds; round += 1) {
    const started = performance.now();
    await (await fetch(fly.url + path(), { headers })).text();
    times.push(performance.now() - started);
  }
  return times.sort((a, b) => a - b)[rounds / 2] ?? NaN;
}

const print = (what: string, ms: number, more = ""): void =>
  console.log(`${what.padEnd(34)} ${ms.toFixed(2).padStart(9)} ms  ${more}`);

async function places(): Promise<void> {
  await using fly = await startFlyLocal({ machines: 5, regions: ["fra", "iad"], port: 0, env });
  const [here, far, sibling] = fly.machines.map(({ id }) => id) as [string, string, string];
  const roomAt = async (id: string): Promise<string> => {
    const host = await Client.open(`${fly.url}/?instance=${id}`);
    return `/room/${await host.create()}`;
  };
  const rooms = {
    local: await roomAt(here),
    "at a sibling": await roomAt(sibling),
    "in another region": await roomAt(far),
  };
  await median(fly, () => "/health"); // warms up
  print("/health (the proxy itself)", await median(fly, () => "/health"));
  for (const [place, path] of Object.entries(rooms)) print(place, await median(fly, () => path));
  print("unknown", await median(fly, () => `/room/${newCode("fra")}`));
  print("unknown, of another region", await median(fly, () => `/room/${newCode("iad")}`));
  fly.silence(sibling);
  print("unknown, a sibling silent", await median(fly, () => `/room/${newCode("fra")}`));
}

async function growth(siblings: number): Promise<void> {
  await using fly = await startFlyLocal({ machines: siblings + 1, regions: ["fra"], port: 0, env });
  const unknown = (): string => `/room/${newCode("fra")}`;
  await median(fly, unknown); // warms up
  const accepted = (): number => fly.machines.slice(1).reduce((sum, { id }) => sum + fly.accepted(id), 0);
  const before = accepted();
  const ms = await median(fly, unknown);
  print(`unknown, ${siblings} siblings`, ms, `${(accepted() - before) / rounds} connections`);
}

await places();
for (const siblings of [2, 5, 10, 20]) await growth(siblings);
