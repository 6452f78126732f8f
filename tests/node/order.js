// An order and its receipt in one transaction. usage: node order.js DATABASE_URL KEY commit|rollback
"use strict";
const { Client } = require("pg");

const [url, key, ending] = process.argv.slice(2);

(async () => {
  const client = new Client({ connectionString: url });
  await client.connect();
  await client.query("BEGIN");
  await client.query("INSERT INTO people (id, email, name) VALUES (99, 'nora@example.com', 'Nora')");
  const { rows } = await client.query(
    `SELECT outbox.enqueue(key => $1, sender => $2, recipient => $3, subject => $4, body_text => $5, body_html => $6) AS new`,
    [key, "Shop <shop@example.com>", "Nora <nora@example.com>", "Your order ✓", "Thank you, Nora.", "<p>Thank you, Nora.</p>"],
  );
  await client.query(ending.toUpperCase());
  await client.end();
  console.log(rows[0].new);
})();
