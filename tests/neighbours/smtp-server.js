// nodemailer's smtp-server, which keeps each message in a file of its own.
// usage: node smtp-server.js PORT DIRECTORY OPTIONS-AS-JSON
"use strict";
const fs = require("node:fs");
const path = require("node:path");
const { SMTPServer } = require("smtp-server");

const [port, directory, options] = process.argv.slice(2);
let count = 0;

const server = new SMTPServer({
  authOptional: true,
  disabledCommands: ["AUTH", "STARTTLS"],
  ...JSON.parse(options),
  onRcptTo({ address }, session, callback) {
    callback(address.startsWith("unknown") ? Object.assign(new Error("unknown user"), { responseCode: 550 }) : null);
  },
  onData(stream, session, callback) {
    const chunks = [];
    stream.on("data", (chunk) => chunks.push(chunk));
    stream.on("end", () => {
      const recipients = session.envelope.rcptTo.map((to) => to.address).join(",");
      const name = `${process.pid}-${++count}`;
      fs.writeFileSync(path.join(directory, `.${name}`), Buffer.concat([Buffer.from(recipients + "\n"), ...chunks]));
      fs.renameSync(path.join(directory, `.${name}`), path.join(directory, name));
      callback();
    });
  },
});
server.on("error", (error) => console.error(error.message));
server.listen(Number(port), "127.0.0.1");
process.on("SIGTERM", () => server.close(() => process.exit(0)));
