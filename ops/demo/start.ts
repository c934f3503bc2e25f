/**
 * Serves the demo, and starts a relay if none answers: `bun run ops/demo/start.ts`.
 *
 * Environment: `DEMO_PORT` (8080) of the page; `RELAY_URL` of a relay that runs elsewhere, else the variables of
 * `server.ts`, of which `PORT` says where a relay is looked for and started.
 */
import { networkInterfaces } from "node:os";
import { configFromEnv, startRelay } from "../../server.ts";
import index from "./index.html";
import type { Place } from "./ui.ts";

const DEMO_PORT = 8080;
const HEALTH_MS = 2_000; // for a relay to say that it is there

/** This machine's address in the local network; `localhost` if it has none. */
function lanAddress(): string {
  const addresses = Object.values(networkInterfaces()).flatMap((entries) => entries ?? []);
  return addresses.find(({ family, internal }) => family === "IPv4" && !internal)?.address ?? "localhost";
}

/** Whether a hostname means the machine that it is said on. */
function isLocal(hostname: string): boolean {
  return ["localhost", "127.0.0.1", "[::1]"].includes(hostname);
}

/**
 * Serves the page, for this machine and the local network.
 * @param port 0 takes a free one
 * @param relay where browsers find the relay; `localhost` becomes the name under which they found the page
 */
export function serveDemo({ port, relay }: { port: number; relay: string }): Bun.Server<undefined> {
  return Bun.serve({
    port,
    development: false,
    reusePort: false, // which `development: false` turns on: two demos would share the port
    routes: {
      "/": index,
      "/place.json": (request) => {
        const page = new URL(request.url);
        const found = new URL(relay);
        if (isLocal(found.hostname)) found.hostname = page.hostname;
        if (isLocal(page.hostname)) page.hostname = lanAddress(); // a phone's localhost is the phone
        const place: Place = { relay: found.href, page: page.origin };
        return Response.json(place);
      },
    },
    fetch: () => new Response("Not found", { status: 404 }),
  });
}

async function answers(relay: string): Promise<boolean> {
  const health = new URL("/health", relay.replace(/^ws/, "http"));
  try {
    const answer = await fetch(health, { signal: AbortSignal.timeout(HEALTH_MS) });
    return (await answer.json()).status === "ok";
  } catch {
    return false;
  }
}

async function main(): Promise<void> {
  const { RELAY_URL, DEMO_PORT: port = DEMO_PORT } = process.env;
  if (!/^\d+$/.test(`${port}`) || Number(port) > 65535)
    throw new Error(`DEMO_PORT must be a whole number from 0 to 65535, not ${JSON.stringify(port)}`);
  if (RELAY_URL !== undefined && !/^(?:ws|http)s?:$/.test(URL.parse(RELAY_URL)?.protocol ?? ""))
    throw new Error(`RELAY_URL must be a ws, wss, http or https URL, not ${JSON.stringify(RELAY_URL)}`);
  let relay = RELAY_URL;
  let how = "";
  if (relay === undefined) {
    const config = configFromEnv(process.env);
    relay = `http://localhost:${config.port}`;
    if (!(await answers(relay))) {
      how = ", started here";
      relay = startRelay(config).url;
    }
  } else if (!(await answers(relay))) how = ", which doesn't answer: the page keeps trying";
  console.log(`Relay: ${relay}${how}`);
  const page = serveDemo({ port: Number(port), relay });
  console.log(`Demo:  ${page.url.origin} on the big screen, http://${lanAddress()}:${page.port} on phones`);
}

if (import.meta.main) {
  await main().catch(({ code, message }: Error & { code?: string }) => {
    console.error(code === "EADDRINUSE" ? `DEMO_PORT ${process.env.DEMO_PORT ?? DEMO_PORT} is in use` : message);
    process.exit(1);
  });
}
