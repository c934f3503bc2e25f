/** A walk through every state of the demo's screens: one page hosts, one plays, and the other players have no page. */
import { Client, type Frame } from "../shared/client.ts";
import { RelayProcess } from "../shared/processes.ts";
import { press, type Game } from "./game.ts";
import { serveDemo } from "./start.ts";
import { PHONE, Tab, TELEVISION } from "./tab.ts";

const NAMES =
  "Ann Ben Cleo Dev Ella Finn Gia Hugo Iris Jun Kai Lena Maximiliane_III Noor Otto Pia Quinn Rosa Sami Tess Uma Vito Wren Xaver";

/** The code of the room that a page hosts. */
export function roomOf(host: Tab): Promise<string> {
  return host.until<string>("document.querySelector('#code').dataset.code");
}

/**
 * @param rounds so many players win one, in the order of their slots; of four or more players the last two have gone before
 * @param look called in each state with the tab that shows it
 * @throws if a page has written an error to its console
 */
export async function walk(players: number, rounds: number, look: (state: string, tab: Tab, isHost: boolean) => Promise<void>) {
  await using relay = await RelayProcess.start();
  await using demo = serveDemo({ port: 0, relay: relay.url });
  using host = new Tab(TELEVISION);
  using phone = new Tab(PHONE); // of the player in slot 1
  const page = demo.url.origin;
  const lookAtHost = (state: string) => look(state, host, true);
  const lookAtPhone = (state: string) => look(state, phone, false);

  await phone.open(page);
  await phone.says(".slogan", "First");
  await lookAtPhone("start");
  await phone.type("#codeInput", "K0Ol");
  await phone.press("Enter");
  await phone.says("#notice", "No code has");
  await lookAtPhone("start-fault");

  await host.open(`${page}/#host`);
  const room = await roomOf(host);
  await host.says("#headcount", "Waiting");
  await lookAtHost("lobby-empty");
  await phone.open(`${page}/#${room}`);
  await phone.says("#buzzText", "You're in");
  await phone.type("#myName", "Ann");
  await phone.press("Enter");
  const names = NAMES.split(" ");
  const others = new Map<number, Client>();
  for (let slot = 2; slot <= players; slot++) {
    const client = await Client.open(relay.url);
    await client.join(room, `player ${slot}`);
    client.send({ type: "send", to: 0, data: { name: names[slot - 1] } });
    others.set(slot, client);
  }
  for (const slot of [1, players]) await host.says(`#player${slot} .name`, names[slot - 1]!);
  await host.says("#headcount", `${players} in`);
  await lookAtHost("lobby");
  await lookAtPhone("lobby");

  await host.click("#start");
  await phone.says("#line", "next question");
  await lookAtHost("ready");
  await lookAtPhone("ready");
  await host.click("#lock");
  await host.says("#where", "Join at");
  await lookAtHost("unlocked");
  await host.click("#showQr");
  await lookAtHost("qr");
  await host.click("#sheetClose");
  if (players > 3) {
    await host.click(`#player${players}`);
    await lookAtHost("sheet");
    await host.click("#sheetAction");
    await host.says(`#player${players} .status`, "kicked");
    await others.get(players - 1)!.close();
    await host.says(`#player${players - 1} .status`, "away");
    await host.click(`#player${players - 1}`);
    await host.says("#sheetText", "Whoever scans");
    await lookAtHost("sheet-away");
    await host.click("#sheetClose");
  }
  await phone.click("#move");
  await phone.says("#sheetTitle", "another phone");
  await lookAtPhone("move");
  await phone.click("#sheetClose");

  for (let slot = 1; slot <= Math.min(rounds, players > 3 ? players - 2 : players); slot++) {
    await host.type("#question", "Which planet has the shortest day?");
    await host.press("Enter");
    await phone.says("#buzzText", "Press!");
    if (slot === 1) {
      await lookAtHost("open");
      await lookAtPhone("press");
    }
    if (slot === 1) await phone.click("#buzz");
    else await pressAs(others.get(slot)!);
    await host.says("#winner b", names[slot - 1]!);
    await phone.says("#line", slot === 1 ? "Your answer" : `${names[slot - 1]} was first`);
    await lookAtHost(`won-by-${slot}`);
    await lookAtPhone(`won-by-${slot}`);
    if (slot === 1 && players > 1) {
      await host.click("#wrong");
      await phone.says("#buzzText", "Out");
      await lookAtHost("out");
      await lookAtPhone("out");
      await host.click("#shut");
    } else await host.click("#right");
    await host.says(".title", "What do you ask?");
  }
  for (let press = 0; press < 2; press++) await host.click("#finish");
  await phone.says("#line", "another game");
  await lookAtHost("over");
  await lookAtPhone("over");
  for (let press = 0; press < 2; press++) await host.click("#close");
  await host.says("#notice", "Thanks for playing");
  await phone.says("#line", "Thanks for playing");
  await lookAtHost("closed");
  await lookAtPhone("closed");

  await host.open(`${page}/#host`);
  await phone.open(`${page}/#${await roomOf(host)}`);
  await host.says("#headcount", "1 in");
  await host.click("#start");
  await host.says(".title", "What do you ask?");
  await host.click("#open");
  await phone.says("#buzzText", "Press!");
  await relay.stop("SIGKILL");
  for (const tab of [host, phone]) await tab.says("#bannerText", "can't be reached");
  await lookAtHost("away");
  await lookAtPhone("away");
  for (const client of others.values()) client.terminate();
  const faults = [...host.faults, ...phone.faults].filter((fault) => !fault.includes("WebSocket")); // the relay has gone away
  if (faults.length > 0) throw new Error(faults.join("\n"));
}

/** Presses as soon as it sees the buzzer open. */
async function pressAs(client: Client): Promise<void> {
  let frame: Frame;
  do frame = await client.next();
  while (frame.type !== "state" || frame.data.phase !== "open");
  const [latest] = (await client.soFar()).filter(({ type }) => type === "state").slice(-1);
  client.send({ type: "send", data: press((latest ?? frame).data as Game), echo: true });
}
