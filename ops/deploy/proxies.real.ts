/** The relay behind nginx, HAProxy and Caddy, and what a reload of each proxy does to a game that runs. */
import { describe, expect, test } from "bun:test";
import { Client } from "../shared/client.ts";
import { testRelay } from "../shared/relay.ts";
import { until } from "../shared/wait.ts";
import { describeBehind } from "./behind.ts";
import { caddy, type Edits, haproxy, nginx, type Program, type Proxy } from "../shared/proxies.ts";

describeBehind(nginx, { "proxy_read_timeout 60s;": "proxy_read_timeout 2s;" }, true);
describeBehind(haproxy, { "client 30s": "client 1s", "server 30s": "server 1s", "tunnel 60s": "tunnel 2s" }, true);

// Caddy has no timeout for WebSockets; those that it has for requests must not end one.
const timeouts = "servers {\n\t\ttimeouts {\n\t\t\tread_body 2s\n\t\t\tread_header 2s\n\t\t\twrite 2s\n\t\t\tidle 2s\n\t\t}\n\t}";
describeBehind(caddy, { "{\n\tadmin": `{\n\t${timeouts}\n\tadmin` }, false);

/** A host and a guest in a room behind a proxy. */
async function play(proxy: Proxy, options: object = {}) {
  const host = await Client.open(proxy.url);
  const room = await host.create(8, "host", options);
  const guest = await Client.open(proxy.url);
  await guest.join(room, "guest");
  await host.next(); // peer_joined
  return { host, guest, room };
}

/** Whether what the reload put into the configuration holds for who comes now. */
const isChanged = async ({ url }: Proxy): Promise<boolean> =>
  (await fetch(`${url}/health`, { keepalive: false })).headers.get("X-Reloaded") === "yes";

const keepers: { program: Program; change: Edits; oldWorkerEnds: RegExp }[] = [
  {
    program: nginx,
    change: { "location / {": "add_header X-Reloaded yes; location / {" },
    oldWorkerEnds: /worker process \d+ exited with code 0/,
  },
  {
    program: haproxy,
    change: { "\nbackend relay\n": "\nbackend relay\n  http-response set-header X-Reloaded yes\n" },
    oldWorkerEnds: /Former worker .*exited with code 0/,
  },
];

for (const { program, change, oldWorkerEnds } of keepers)
  describe.skipIf(program.whyNot !== "")(`a reload of ${program.name} with another configuration${program.whyNot}`, () => {
    test("disturbs no game: the old workers stay until it is over, and who joins meanwhile meets the new ones", async () => {
      await using relay = testRelay();
      await using proxy = await program.start(relay.port);
      const { host, guest, room } = await play(proxy);
      expect(await isChanged(proxy)).toBe(false);
      await proxy.reload(change);
      await until("the new configuration", () => isChanged(proxy));
      host.send({ type: "send", data: "still here?" });
      expect(await guest.next()).toEqual({ type: "message", from: 0, data: "still here?" });
      const late = await Client.open(proxy.url);
      expect(await late.join(room, "late")).toMatchObject({ type: "joined", peers: [0, 1] });
      expect(await host.next()).toEqual({ type: "peer_joined", index: 2 });
      expect(proxy.process.lines.filter((line) => oldWorkerEnds.test(line))).toEqual([]);
      host.send({ type: "close_room" });
      expect(await guest.closed).toEqual({ code: 4001, reason: "room closed" });
      await proxy.process.line(oldWorkerEnds);
    });
  });

describe.skipIf(caddy.whyNot !== "")(`a reload of Caddy with another configuration${caddy.whyNot}`, () => {
  const change = { "\treverse_proxy": "\theader X-Reloaded yes\n\treverse_proxy" };

  test("cuts every socket with 1001 or 1002, which ends each room that doesn't linger", async () => {
    await using relay = testRelay();
    await using proxy = await caddy.start(relay.port);
    const { host, guest, room } = await play(proxy);
    await proxy.reload(change);
    // As a rule 1001, Caddy's own; 1002 if the relay's answer to what Caddy sends it is sent on first.
    for (const player of [host, guest]) expect([1001, 1002]).toContain((await player.closed).code);
    expect(await isChanged(proxy)).toBe(true);
    const again = await Client.open(proxy.url);
    expect(await again.join(room, "host")).toMatchObject({ type: "error", code: "room_not_found" });
  });

  test("leaves a room that lingers, to which its members come back", async () => {
    await using relay = testRelay();
    await using proxy = await caddy.start(relay.port);
    const { host, guest, room } = await play(proxy, { linger: 60 });
    await proxy.reload(change);
    await Promise.all([host.closed, guest.closed]);
    const hostAgain = await Client.open(proxy.url);
    expect(await hostAgain.join(room, "host")).toMatchObject({ type: "joined", index: 0, resumed: true });
    const guestAgain = await Client.open(proxy.url);
    expect(await guestAgain.join(room, "guest")).toMatchObject({ type: "joined", index: 1, peers: [0], resumed: true });
  });
});
