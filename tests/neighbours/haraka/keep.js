// A Haraka plugin that takes mail for every recipient and keeps each message in a file of its own.
"use strict";
const fs = require("node:fs");
const path = require("node:path");

const directory = path.join(process.env.HARAKA, "kept");

exports.hook_rcpt = (next, connection, [recipient]) =>
  recipient.user.startsWith("unknown") ? next(DENY, "unknown user") : next(OK);

exports.hook_queue = (next, connection) => {
  const { transaction } = connection;
  const hidden = path.join(directory, `.${transaction.uuid}`);
  const file = fs.createWriteStream(hidden);
  file.write(`${transaction.rcpt_to.map((to) => to.address).join(",")}\n`);
  file.on("close", () => {
    fs.renameSync(hidden, path.join(directory, transaction.uuid));
    next(OK);
  });
  transaction.message_stream.pipe(file);
};
