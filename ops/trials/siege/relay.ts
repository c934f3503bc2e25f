/**
 * The relay of `bun run siege` that stands on a Fly.io of doubles: `bun run ops/trials/siege/relay.ts SERVER`. Sibling `b` has
 * every room whose code ends with `z`; of any other code neither says a word.
 */
import type { Siblings } from "../../../server.ts";

const siblings: Siblings = {
  list: () => Promise.resolve(["a", "b"]),
  has(id, code, signal) {
    if (id === "b" && code.endsWith("z")) return Promise.resolve(true);
    return new Promise((_, reject) => signal.addEventListener("abort", () => reject(new Error("given up"))));
  },
};

const [server = ""] = Bun.argv.slice(2);
const { configFromEnv, startRelay } = (await import(server)) as typeof import("../../../server.ts");
const config = configFromEnv(process.env);
const cluster = config.cluster && { ...config.cluster, siblings };
const older = { siblings }; // where relays before `cluster` look for them, to compare with
const { port } = startRelay({ ...config, ...older, cluster });
console.log(`listening port=${port}`);
