/**
 * The regions that room codes can name, in the order of their 5-bit positions.
 *
 * Append only: a position that was issued once keeps its meaning, because codes of it are on people's screens.
 * A code has 5 bits for the position, so 32 rows are the most there can be.
 */
export const REGIONS: readonly string[] = [
  "ams", // Amsterdam
  "arn", // Stockholm
  "bom", // Mumbai
  "cdg", // Paris
  "dfw", // Dallas
  "ewr", // Secaucus
  "fra", // Frankfurt
  "gru", // São Paulo
  "iad", // Ashburn
  "jnb", // Johannesburg
  "lax", // Los Angeles
  "lhr", // London
  "nrt", // Tokyo
  "ord", // Chicago
  "sin", // Singapore
  "sjc", // San Jose
  "syd", // Sydney
  "yyz", // Toronto
];
