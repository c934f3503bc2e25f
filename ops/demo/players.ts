/** The host's list of players: a button each, sorted by score. */
import { labelOf, playerOf, slotsOf, type Game } from "./game.ts";
import { byId, enable, paint, setText } from "./ui.ts";

type Presence = "here" | "away" | "back";

/** Empties the list. @param choose called with the slot of a player that is pressed. @returns what shows a game in it */
export function playerList(choose: (slot: number) => void) {
  const list = byId("players");
  const rows = new Map<number, HTMLLIElement>();
  list.replaceChildren();

  function newRow(slot: number): HTMLLIElement {
    const row = document.createElement("li");
    const button = row.appendChild(document.createElement("button"));
    button.type = "button";
    button.id = `player${slot}`;
    button.onclick = () => choose(slot);
    for (const name of ["swatch", "name", "status", "score"]) {
      button.appendChild(document.createElement("span")).className = name;
    }
    paint(row, slot);
    rows.set(slot, row);
    return row;
  }

  return (game: Game, presenceOf: (slot: number) => Presence, works: boolean): void => {
    const slots = slotsOf(game);
    for (const [slot, row] of rows) {
      if (slots.includes(slot)) continue;
      row.remove();
      rows.delete(slot);
    }
    for (const [i, slot] of slots.entries()) {
      const row = rows.get(slot) ?? newRow(slot);
      if (list.children[i] !== row) list.insertBefore(row, list.children[i] ?? null);
      const player = playerOf(game, slot);
      const status = player.kicked ? "kicked" : presenceOf(slot);
      row.dataset.status = status;
      row.classList.toggle("first", game.winner === slot);
      setText(row.querySelector(".name")!, labelOf(game, slot));
      const said = status === "here" ? (game.out.includes(slot) ? "out" : "") : status;
      setText(row.querySelector(".status")!, said);
      setText(row.querySelector(".score")!, String(player.score));
      enable(`player${slot}`, works && !player.kicked);
    }
    setText(byId("about"), slots.length > 0 ? "Press a name to help or to kick." : "Nobody yet.");
  };
}
