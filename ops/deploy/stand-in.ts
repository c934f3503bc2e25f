/** A relay that does section 9, made of one that does section 8: replaced by server.ts once that does both. */
import { configFromEnv, startRelay } from "../../server.ts";

const env = process.env;
const peers = (env.PEERS ?? "").split(",");
const self = env.INSTANCE_ID ?? "";
const address = (id: string) => (env.PEER_ADDRESS ?? `{id}:${env.PORT}`).replace("{id}", id);
let draining = false;
const serve = Bun.serve;
(Bun as any).serve = (options: any) =>
  serve({
    ...options,
    hostname: env.HOST,
    async fetch(request: Request, server: any) {
      if (env.TRACE) console.log("asked", request.method, request.url, JSON.stringify([...request.headers]));
      const { headers } = request;
      const pin = new URL(request.url, "http://x").searchParams.get("instance");
      const path = new URL(request.url, "http://x").pathname;
      for (const name of ["fly-replay-src", "fly-replay-failed"]) headers.delete(name);
      if (headers.get("x-relay-src") || (pin !== null && !peers.includes(pin))) headers.set("fly-replay-src", "1");
      if (headers.get("x-relay-failed")) headers.set("fly-replay-failed", "1");
      const upgrade = headers.has("upgrade");
      if (!upgrade && pin !== null && !peers.includes(pin)) {
        const url = new URL(request.url, "http://x");
        url.searchParams.delete("instance");
        request = new Request(url, { headers });
        request.headers.delete("fly-replay-src");
      }
      if (draining && upgrade && pin === null && !/^\/\w{6}$/.test(path)) return new Response("", { status: 503 });
      const answer: Response | undefined = await options.fetch(request, server);
      const [, to] = /^instance=([^;]*)/.exec(answer?.headers.get("fly-replay") ?? "") ?? [];
      if (to === undefined) return answer;
      return new Response("", { headers: { "X-Accel-Redirect": `/@relay/${to}` } });
    },
  });
const config = configFromEnv({ ...env, INSTANCE_ID: undefined, ADDRESS_HEADER: "X-Forwarded-For" });
const relay = startRelay({
  ...config,
  instance: self,
  flyApp: "cluster",
  flyRegion: "ams",
  siblings: {
    list: async () => peers.filter((id) => id !== self),
    async has(id, code, signal) {
      const headers = { "X-Party-Probe": "1" };
      const answer = await fetch(`http://${address(id)}/room/${code}`, { headers, redirect: "manual", keepalive: false, signal });
      await answer.body?.cancel();
      return answer.status === 200;
    },
  },
});
process.on("SIGTERM", () => {
  draining = true;
  void relay.drain();
});
console.log(`listening port=${relay.port}`);
await relay.ended;
process.exit(0);
