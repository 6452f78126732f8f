"""Steps from each version of the schema to the next, for databases that were made before.

`schema.sql` is always the newest version as a whole. `schema.initialise` runs the steps that a database lacks in one
transaction, so a step must not contain BEGIN, COMMIT or CONCURRENTLY.
"""

from collections.abc import Mapping
from typing import Final

# A row outside of the bounds of version 6 could never be updated again: not claimed, not expired, not cancelled. The
# update runs once for all rows before the constraints are added, and once for open rows that were written meanwhile.
_INTO_BOUNDS: Final = """
UPDATE outbox.delivery
   SET due_at = CASE WHEN due_at = 'infinity' THEN due_at
                     ELSE greatest(least(due_at, '2999-12-31 00:00:00+00'), '1970-01-01 00:00:00+00') END,
       send_before = CASE WHEN send_before < 'infinity'
                          THEN greatest(least(send_before, '2999-12-31 00:00:00+00'), '1970-01-01 00:00:00+00') END
 WHERE (due_at < '1970-01-01 00:00:00+00' OR (due_at >= '3000-01-01 00:00:00+00' AND due_at < 'infinity')
        OR send_before < '1970-01-01 00:00:00+00' OR send_before >= '3000-01-01 00:00:00+00')
"""

UPGRADES: Final[Mapping[int, str]] = {
    2: """
        ALTER TABLE outbox.schema_version ADD COLUMN compatible integer;
        UPDATE outbox.schema_version SET compatible = version;
        ALTER TABLE outbox.schema_version ALTER COLUMN compatible SET NOT NULL, ADD CHECK (compatible <= version);
        ALTER TABLE outbox.delivery ADD COLUMN orphaned integer NOT NULL DEFAULT 0, ADD COLUMN doubted_at timestamptz;
        UPDATE outbox.delivery SET doubted_at = marked_at WHERE state = 'in_doubt';
        ALTER TABLE outbox.delivery ADD CHECK ((doubted_at IS NULL) = (state <> 'in_doubt'));
        CREATE INDEX delivery_doubt ON outbox.delivery (due_at, email)
            WHERE settled_at IS NULL AND doubted_at IS NOT NULL;
        CREATE INDEX delivery_suspect ON outbox.delivery (due_at, email) WHERE settled_at IS NULL AND orphaned >= 3;
        ALTER TABLE outbox.attempt DROP CONSTRAINT attempt_verdict_check, ADD CONSTRAINT attempt_verdict_check
            CHECK (verdict IN ('accepted', 'deferred', 'refused', 'in_doubt', 'withdrawn',
                               'quarantined', 'asked', 'resolved'));
        ALTER TABLE outbox.relay ADD COLUMN timeline bigint NOT NULL DEFAULT 0,
            ADD COLUMN stale integer NOT NULL DEFAULT 0, ADD COLUMN trouble text;
        CREATE TABLE outbox.route (
            name text PRIMARY KEY, since timestamptz NOT NULL DEFAULT now(), reason text NOT NULL,
            failures integer NOT NULL DEFAULT 1, relay integer, retry_at timestamptz NOT NULL);
        CREATE TABLE outbox.operation (
            id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, at timestamptz NOT NULL DEFAULT now(),
            who text NOT NULL, what text NOT NULL, target text NOT NULL, why text NOT NULL,
            emails bigint NOT NULL CHECK (emails >= 0));
    """,
    3: """
        ALTER TABLE outbox.delivery ADD COLUMN send_before timestamptz, SET (fillfactor = 50);
        CREATE INDEX delivery_late ON outbox.delivery (send_before)
            WHERE settled_at IS NULL AND send_before IS NOT NULL;
        ALTER TABLE outbox.attempt DROP CONSTRAINT attempt_verdict_check, ADD CONSTRAINT attempt_verdict_check
            CHECK (verdict IN ('accepted', 'deferred', 'refused', 'in_doubt', 'withdrawn',
                               'quarantined', 'asked', 'resolved', 'expired'));
        CREATE TABLE outbox.pace (route text PRIMARY KEY, next_at timestamptz NOT NULL DEFAULT now());
        CREATE TABLE outbox.allowance (
            route text NOT NULL, since timestamptz NOT NULL, emails bigint NOT NULL CHECK (emails >= 0),
            PRIMARY KEY (route, since));
        CREATE TABLE outbox.pruned (
            what text PRIMARY KEY CHECK (what IN ('email', 'report')), up_to bigint NOT NULL,
            at timestamptz NOT NULL DEFAULT now());
    """,
    4: """
        ALTER TABLE outbox.edition ADD COLUMN completed_at timestamptz;
        UPDATE outbox.edition SET completed_at = now() WHERE created_at < now() - interval '1 day';
        ALTER TABLE outbox.email ADD COLUMN traceparent text, ADD COLUMN made_by text;
        ALTER TABLE outbox.delivery ADD COLUMN paused text,
            ADD CHECK (paused IS NULL OR state <> 'pending' OR due_at = 'infinity');
        CREATE INDEX delivery_paused ON outbox.delivery (paused) WHERE settled_at IS NULL AND paused IS NOT NULL;
        ALTER TABLE outbox.attempt DROP CONSTRAINT attempt_verdict_check, ADD CONSTRAINT attempt_verdict_check
            CHECK (verdict IN ('accepted', 'deferred', 'refused', 'in_doubt', 'withdrawn',
                               'quarantined', 'asked', 'resolved', 'expired', 'cancelled', 'retried'));
        ALTER TABLE outbox.relay ADD COLUMN sent bigint NOT NULL DEFAULT 0, ADD COLUMN last_reply text;
        CREATE TABLE outbox.pause (
            report text PRIMARY KEY, since timestamptz NOT NULL DEFAULT now(), who text NOT NULL, why text NOT NULL);
        CREATE TABLE outbox.schedule (
            report text PRIMARY KEY, tick_at timestamptz NOT NULL, done_at timestamptz,
            failures integer NOT NULL DEFAULT 0 CHECK (failures >= 0), retry_at timestamptz NOT NULL DEFAULT now(),
            said text);
        CREATE TABLE outbox.digest_item (
            report bigint PRIMARY KEY, address text NOT NULL, name text, link text NOT NULL,
            digest bigint);
        CREATE INDEX digest_item_open ON outbox.digest_item (address) WHERE digest IS NULL;
        CREATE INDEX digest_item_digest ON outbox.digest_item (digest) WHERE digest IS NOT NULL;
    """,
    5: """
        ALTER TABLE outbox.delivery ADD COLUMN route text NOT NULL DEFAULT '',
            ADD COLUMN priority smallint NOT NULL DEFAULT 0 CHECK (priority BETWEEN 0 AND 1);
        DROP INDEX outbox.delivery_due, outbox.delivery_suspect;
        CREATE INDEX delivery_due ON outbox.delivery (route, priority, due_at, email) WHERE settled_at IS NULL;
        CREATE INDEX delivery_suspect ON outbox.delivery (route, due_at, email)
            WHERE settled_at IS NULL AND orphaned >= 3;
        ALTER TABLE outbox.attempt DROP CONSTRAINT attempt_verdict_check, ADD CONSTRAINT attempt_verdict_check
            CHECK (verdict IN ('accepted', 'deferred', 'refused', 'in_doubt', 'withdrawn',
                               'quarantined', 'asked', 'resolved', 'expired', 'cancelled', 'retried', 'suppressed',
                               'bounced'));
        ALTER TABLE outbox.relay ADD COLUMN route text NOT NULL DEFAULT '';
        CREATE INDEX email_recipient ON outbox.email (lower(recipient) text_pattern_ops);
        CREATE TABLE outbox.rule (
            position integer PRIMARY KEY, route text NOT NULL CHECK (route <> ''), report text,
            domain text CHECK (domain = lower(domain)), CHECK (report IS NOT NULL OR domain IS NOT NULL));
        CREATE TABLE outbox.suppression (
            address text COLLATE "C" NOT NULL CHECK (address <> '' AND address = lower(address)),
            report text NOT NULL DEFAULT '', since timestamptz NOT NULL DEFAULT now(),
            reason text NOT NULL CHECK (reason IN ('bounced', 'complained', 'unsubscribed', 'decided')),
            who text NOT NULL, why text NOT NULL, email bigint, PRIMARY KEY (address, report));
        CREATE TABLE outbox.bounce (
            email bigint NOT NULL, message text NOT NULL, at timestamptz NOT NULL DEFAULT now(),
            kind text NOT NULL CHECK (kind IN ('hard', 'soft', 'complained')), status text,
            PRIMARY KEY (email, message));
    """,
    6: f"""
        SET LOCAL search_path = pg_catalog, pg_temp;
        -- email and delivery: bounds
        {_INTO_BOUNDS};
        ALTER TABLE outbox.delivery
            ADD CONSTRAINT delivery_bounds CHECK (due_at >= '1970-01-01 00:00:00+00'
                AND (due_at < '3000-01-01 00:00:00+00' OR due_at = 'infinity')
                AND (send_before IS NULL
                     OR send_before >= '1970-01-01 00:00:00+00' AND send_before < '3000-01-01 00:00:00+00')) NOT VALID;
        {_INTO_BOUNDS} AND settled_at IS NULL;
        ALTER TABLE outbox.email
            ADD CONSTRAINT email_message_size CHECK (octet_length(message) <= 20971520) NOT VALID,
            ADD CONSTRAINT email_sizes CHECK (octet_length(key) <= 1000 AND octet_length(sender) <= 320
                AND octet_length(recipient) <= 320 AND octet_length(message_id) <= 998
                AND (traceparent IS NULL OR octet_length(traceparent) <= 200)
                AND (made_by IS NULL OR octet_length(made_by) <= 500)
                AND (octet_length(message) <= 65536
                     OR position('\\x0d0a0d0a'::bytea IN substr(message, 1, 65540)) BETWEEN 1 AND 65537)) NOT VALID;

        -- bounce tokens
        CREATE TABLE outbox.bounce_key (
            id smallint PRIMARY KEY CHECK (id BETWEEN 1 AND 999),
            secret bytea NOT NULL CHECK (octet_length(secret) = 32),
            created_at timestamptz NOT NULL DEFAULT now(), retired_at timestamptz);
        CREATE UNIQUE INDEX bounce_key_signs ON outbox.bounce_key ((true)) WHERE retired_at IS NULL;
        INSERT INTO outbox.bounce_key (id, secret)
        VALUES (1, sha256(convert_to(concat(gen_random_uuid(), gen_random_uuid(), gen_random_uuid()), 'UTF8')));

        -- board sessions
        CREATE TABLE outbox.board_session (
            id bytea PRIMARY KEY CHECK (octet_length(id) = 32),
            name text NOT NULL CHECK (name <> '' AND octet_length(name) <= 500),
            created_at timestamptz NOT NULL DEFAULT now(),
            expires_at timestamptz NOT NULL CHECK (expires_at > created_at AND expires_at < 'infinity'));
        CREATE INDEX board_session_expires ON outbox.board_session (expires_at);
    """,
    7: """
        SET LOCAL search_path = pg_catalog, pg_temp;
        -- the barrier after a change of servers
        ALTER TABLE outbox.relay ADD COLUMN instance text, ADD COLUMN told_epoch bigint;
        CREATE INDEX relay_told ON outbox.relay (told_epoch) WHERE told_epoch IS NOT NULL;
        CREATE TABLE outbox.failover (
            one boolean PRIMARY KEY DEFAULT true CHECK (one), epoch bigint NOT NULL DEFAULT 0,
            kind text NOT NULL DEFAULT 'start' CHECK (kind IN ('start', 'gap', 'move')),
            awaited text[] NOT NULL DEFAULT '{}', raised_at timestamptz NOT NULL DEFAULT now(),
            lift_after timestamptz NOT NULL DEFAULT now(), until timestamptz NOT NULL DEFAULT now(),
            lifted_at timestamptz DEFAULT now(), moved_epoch bigint NOT NULL DEFAULT 0, moved_at timestamptz);
        INSERT INTO outbox.failover DEFAULT VALUES;

        -- what a mail server takes
        ALTER TABLE outbox.pace ADD COLUMN found_rate double precision, ADD COLUMN found_at timestamptz,
            ADD COLUMN resumes_at timestamptz, ADD COLUMN silence_s double precision, ADD COLUMN said text,
            ADD CONSTRAINT pace_found CHECK (
                num_nulls(found_rate, found_at, resumes_at, silence_s, said) IN (0, 5)
                AND (found_rate IS NULL OR (found_rate > 0 AND found_rate <= 1e6 AND silence_s BETWEEN 0 AND 3600)));
        ALTER TABLE outbox.route ADD COLUMN logins integer NOT NULL DEFAULT 0 CHECK (logins >= 0);
    """,
    8: """
        SET LOCAL search_path = pg_catalog, pg_temp;
        -- Relays settle nothing from `LOCK_IN_ORDER` to the commit, so that the trigger of `failure`, which comes last,
        -- misses none.
        LOCK TABLE outbox.edition, outbox.schedule, outbox.bounce, outbox.attempt IN ACCESS EXCLUSIVE MODE;

        -- replica identity and plans
        ALTER TABLE outbox.attempt REPLICA IDENTITY FULL;

        -- editions and schedules
        ALTER TABLE outbox.edition ADD COLUMN looked_at timestamptz,
            ADD COLUMN may_be_empty boolean NOT NULL DEFAULT false, ADD COLUMN done_elsewhere_at timestamptz,
            ADD COLUMN done_elsewhere_by text, ADD COLUMN done_elsewhere_why text;
        UPDATE outbox.edition SET may_be_empty = true WHERE expected = 0;
        DELETE FROM outbox.edition e
         WHERE e.expected IS NULL AND e.created_at < now() - interval '1 hour'
           AND (SELECT r.id FROM outbox.report r WHERE r.edition = e.id LIMIT 1) IS NULL;
        ALTER TABLE outbox.schedule ADD COLUMN since timestamptz;

        -- what needs a person
        CREATE TABLE outbox.unreached (
            edition integer NOT NULL REFERENCES outbox.edition, recipient_key text NOT NULL, reason text NOT NULL,
            since timestamptz NOT NULL DEFAULT now(), PRIMARY KEY (edition, recipient_key));
        CREATE TABLE outbox.waiver (
            edition integer NOT NULL REFERENCES outbox.edition, recipient_key text NOT NULL,
            at timestamptz NOT NULL DEFAULT now(), who text NOT NULL, why text NOT NULL,
            PRIMARY KEY (edition, recipient_key));
        CREATE TABLE outbox.failure (email bigint PRIMARY KEY, at timestamptz NOT NULL DEFAULT now());
        INSERT INTO outbox.failure (email, at)
        SELECT d.email, d.settled_at FROM outbox.delivery d
         WHERE d.state = 'expired' AND d.settled_at > now() - interval '40 days' AND EXISTS (
                   SELECT FROM outbox.email m WHERE m.id = d.email AND m.report IS NOT NULL)
            OR d.state = 'dead' AND NOT EXISTS (
                   SELECT FROM outbox.attempt a
                    WHERE a.email = d.email AND a.attempt = d.attempt AND a.verdict = 'resolved'
                      AND a.settled_at >= d.settled_at);

        -- bounces
        ALTER TABLE outbox.bounce ADD COLUMN proves boolean NOT NULL DEFAULT false,
            ADD COLUMN counts boolean NOT NULL DEFAULT false;

        -- enqueue
        DROP FUNCTION IF EXISTS outbox.header_text(text, integer), outbox.body_base64(text);
        DROP FUNCTION IF EXISTS outbox.enqueue(
            text, text, text, text, text, text, text[], text[], text[], text[], jsonb, timestamptz, timestamptz,
            text, text);
    """,
    9: """
        SET LOCAL search_path = pg_catalog, pg_temp;  -- the views, which `views_sql` makes
    """,
}
"""The step to each version from the one before."""
