-- outbox: the one schema, at version 9. `outbox init` applies it (or upgrades an older one) and may be run by
-- every server at once; `psql -1 -f schema.sql` does the same on an empty database. PostgreSQL 14 or later.
--
-- A report travels through these tables in this order:
--
--     definition → edition → report → email → delivery → attempt        relay: who carries it · route: how
--                                                                       pace, allowance: how fast
--                                                                       operation: what people decided
--                                                                       pause: what is held back by people
--                                                                       pruned: how far bodies are removed
--                                                                       suppression: who gets no more · bounce: why
--                                                                       failover: what claims wait for after one
--     schedule starts editions · digest_item: reports that wait for a digest, which is a report, too
--     put, enqueue: an application's own emails, in its own transaction
--
-- A delivery is pending, then sending (marked), then sent, dead or in_doubt; or expired, or cancelled. docs/architecture.md
-- has the picture, and who may change what. A pending row with `paused` is held back: its report is paused, and it is due
-- when that ends.

-- Without this, a function or an operator of another schema on the search path could become part of an index or a
-- constraint here, and run with the rights of everybody who writes a row (CVE-2018-1058). Functions have the same
-- settings of their own; those with a backslash in a literal also that of how it is read, which their caller could change.
set local search_path = pg_catalog, pg_temp;
set local standard_conforming_strings = on;

create schema outbox;
comment on schema outbox is 'Transactional outbox for report emails; made and upgraded by `outbox init`.';

-- `compatible` is the oldest schema version whose programs may still work on this one: while a fleet is upgraded
-- server by server, those that are still to come go on.
create table outbox.schema_version (
    version     integer primary key,
    compatible  integer not null check (compatible <= version),
    applied_at  timestamptz not null default now()
);

-- What one period of a report means, agreed by the whole fleet. One instant must never give two period keys
-- (that would be two emails), so a server whose settings differ is refused.
create table outbox.definition (
    report      text primary key,
    cadence     text not null check (cadence in ('weekly', 'daily', 'monthly')),
    covers      text not null check (covers in ('previous', 'current')),
    timezone    text not null,
    defined_at  timestamptz not null default now()
);

-- One report for one period, for all its recipients. `generate` reads all recipients in a *look*; the results of the look
-- that began last are kept. A person can declare that another system made an edition (`outbox mark-done`): generate then
-- makes nothing of it.
create table outbox.edition (
    id          integer generated always as identity primary key,
    report      text not null,
    period      text not null,
    starts_at   timestamptz not null,
    ends_at     timestamptz not null,
    expected    bigint check (expected >= 0),           -- distinct recipients of the latest complete look; null before
    created_at  timestamptz not null default now(),
    completed_at timestamptz,                           -- when a relay first saw that every report is made and sent
    looked_at   timestamptz,                            -- when that look began
    may_be_empty boolean not null default false,        -- without recipients it is complete; else that is an error
    done_elsewhere_at timestamptz,                      -- when a person declared that another system made it
    done_elsewhere_by text,                             -- ... who
    done_elsewhere_why text,                            -- ... and why
    unique (report, period),
    check (starts_at < ends_at)
);

-- What is said to one recipient. The unique key is the promise: one report per recipient and period, for ever.
create table outbox.report (
    id             bigint generated always as identity primary key,
    edition        integer not null references outbox.edition,
    recipient_key  text not null,
    token          text not null unique,
    title          text not null,
    html           text not null,
    created_at     timestamptz not null default now(),
    unique (edition, recipient_key)
);

-- Recipients of an edition who have no report, as the latest complete look of `generate` found them, with the reason.
-- Whoever has got a report since then is reached; readers check `report` too.
create table outbox.unreached (
    edition        integer not null references outbox.edition,
    recipient_key  text not null,
    reason         text not null,
    since          timestamptz not null default now(),
    primary key (edition, recipient_key)
);

-- Decisions of people that nothing is owed to a recipient for an edition. `generate` makes no report for them and does
-- not count them as failed; an edition is complete without them. They stay in `edition.expected`.
create table outbox.waiver (
    edition        integer not null references outbox.edition,
    recipient_key  text not null,
    at             timestamptz not null default now(),
    who            text not null,
    why            text not null,
    primary key (edition, recipient_key)
);

-- Remove an edition that a generate opened and could make nothing of; true if it is gone. It has no reports, no look at
-- its recipients was complete, and no person declared anything of it. If another session adds a report at this moment,
-- the foreign key has the last word. It runs as the schema's owner: no role may remove other editions.
create function outbox.remove_unused_edition(edition integer) returns boolean language plpgsql security definer
    set search_path = pg_catalog, pg_temp as $$
begin
    delete from outbox.edition e
     where e.id = remove_unused_edition.edition and e.expected is null and e.done_elsewhere_at is null
       and not exists (select from outbox.report r where r.edition = e.id);
    return found;
exception when foreign_key_violation then
    return false;
end $$;

-- An edition that another system made gets no report, not even from a generate of a version that knows nothing of
-- `outbox mark-done`. Each waits for the other by the edition's row: mark-done sees the reports of every transaction that
-- was first. It runs as the schema's owner, since not every role that inserts may lock the row.
create function outbox.refuse_report() returns trigger language plpgsql security definer
    set search_path = pg_catalog, pg_temp as $$
declare
    edition record;
begin
    select e.report, e.period, e.done_elsewhere_at, e.done_elsewhere_by into edition
      from outbox.edition e where e.id = new.edition for key share;
    if edition.done_elsewhere_at is not null then
        raise exception using errcode = '55000',
            message = format('%s %s is done elsewhere, as %s declared; no report is made', edition.report, edition.period,
                             edition.done_elsewhere_by),
            hint = format('`outbox mark-done %s %s --undo` takes the declaration back.', edition.report, edition.period);
    end if;
    return new;
end $$;
create trigger report_of_edition before insert on outbox.report for each row execute function outbox.refuse_report();

-- What is sent: envelope and RFC 5322 bytes, fixed when the row is made and never updated, so that a second
-- try carries the same Message-ID and Date. `key` is what makes an email one email: who deletes old reports must keep
-- this row. `outbox prune` puts a sentence in the place of `message`, once it is old and settled, and keeps the rest.
create table outbox.email (
    id          bigint generated by default as identity primary key,
    key         text not null unique,
    report      bigint references outbox.report,
    sender      text not null check (sender !~ '[[:cntrl:][:space:]<>]'),                         -- MAIL FROM
    recipient   text not null check (recipient <> '' and recipient !~ '[[:cntrl:][:space:]<>]'),  -- RCPT TO
    message_id  text not null,
    message     bytea not null,
    traceparent text,                                   -- the W3C trace context in which it was made
    made_by     text,                                   -- the process that made it: `host, pid 4711`
    created_at  timestamptz not null default now(),
    -- Limits in octets, so that every row fits a relay, a reader and an index. `outbox init` sets the limit of the
    -- message to `message_bytes_max`; outbox/database/schema.py and `message_bytes_max()` use the name of this constraint.
    constraint email_message_size check (octet_length(message) <= 20971520),
    constraint email_sizes check (octet_length(key) <= 1000 and octet_length(sender) <= 320
        and octet_length(recipient) <= 320 and octet_length(message_id) <= 998
        and (traceparent is null or octet_length(traceparent) <= 200) and (made_by is null or octet_length(made_by) <= 500)
        and (octet_length(message) <= 65536   -- the limit of its header
             or position('\x0d0a0d0a'::bytea in substr(message, 1, 65540)) between 1 and 65537))
);
create index email_report on outbox.email (report);
-- For who looks for an address, from its beginning on. Each new email pays for it once; no relay does.
create index email_recipient on outbox.email (lower(recipient) text_pattern_ops);

-- An email belongs to the report that its key names, `<report>/<period>/<recipient key>`, or to none, and that never
-- changes: the role that makes reports could otherwise give a person's report to another address. The owner may.
create function outbox.check_report() returns trigger language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
    if pg_has_role((select c.relowner from pg_class c where c.oid = tg_relid), 'USAGE') then
        return new;
    end if;
    if tg_op = 'UPDATE' and old.report is not null then
        raise exception using errcode = '23514', message = format('the email %s belongs to a report already', old.key);
    end if;
    if not exists (select from outbox.report r join outbox.edition e on e.id = r.edition
                    where r.id = new.report and new.key = e.report || '/' || e.period || '/' || r.recipient_key) then
        raise exception using errcode = '23514',
            message = format('the email %s is not of report %s: its key has to be REPORT/PERIOD/RECIPIENT KEY of it',
                             new.key, new.report);
    end if;
    return new;
end $$;
create trigger email_report_insert before insert on outbox.email
    for each row when (new.report is not null) execute function outbox.check_report();
create trigger email_report_update before update of report on outbox.email
    for each row when (old.report is distinct from new.report) execute function outbox.check_report();

-- How it goes: one narrow row per email, the only rows that relays update.
-- `attempt` grows with every mark and every refusal and is never reused, so (relay, attempt) is a fence:
-- a verdict that comes late matches its own attempt or nothing. `withdrawn` counts the attempts that say nothing of
-- the message: the final dot was surely not written, or the server took nothing from anybody. `orphaned` counts the
-- relays that died while they held it. In doubt since `doubted_at`; `due_at` then says when the policy acts next
-- ('infinity': never by itself). `send_before` is when it is too late to send it; null is never. `paused` names the
-- report under whose pause a pending row was set aside, with `due_at` at infinity. Only relays of its `route` take it,
-- those of `priority` 1 (urgent) first; neither ever changes but by `outbox init`, where a route is no more.
create table outbox.delivery (
    email       bigint primary key references outbox.email,
    due_at      timestamptz not null default now(),
    marked_at   timestamptz,
    settled_at  timestamptz,
    doubted_at  timestamptz,
    relay       integer,
    attempt     integer not null default 0,
    withdrawn   integer not null default 0,
    orphaned    integer not null default 0,
    state       text not null default 'pending',
    send_before timestamptz,
    paused      text,
    route       text not null default '',
    priority    smallint not null default 0 check (priority between 0 and 1),
    check (state in ('pending', 'sending', 'sent', 'in_doubt', 'dead', 'cancelled', 'expired')),
    check ((settled_at is null) = (state in ('pending', 'sending', 'in_doubt'))),
    check (state not in ('sending', 'in_doubt') or (relay is not null and marked_at is not null)),
    check (state not in ('sending', 'in_doubt', 'sent', 'dead') or attempt > withdrawn),
    check (withdrawn between 0 and attempt),
    check ((doubted_at is null) = (state <> 'in_doubt')),
    check (paused is null or state <> 'pending' or due_at = 'infinity'),
    -- Times that every client can represent. Postgres itself allows 4713 BC to 294276 AD.
    constraint delivery_bounds check (due_at >= '1970-01-01 00:00:00+00'
        and (due_at < '3000-01-01 00:00:00+00' or due_at = 'infinity')
        and (send_before is null or send_before >= '1970-01-01 00:00:00+00' and send_before < '3000-01-01 00:00:00+00'))
) with (
    -- Room for claim and mark on the same page (at 70 every third moves on to another, with entries in two indexes and
    -- 110 bytes of WAL more for each message): none of the indexes below nor their predicates use a column that claim and
    -- mark change, so both are heap-only updates (PostgreSQL docs, 73.7 Heap-Only Tuples).
    fillfactor = 50, autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_insert_scale_factor = 0.05
);
-- A lane is a route and a priority: within it in the order of what is due, so that none walks over another's backlog.
create index delivery_due on outbox.delivery (route, priority, due_at, email) where settled_at is null;
create index delivery_doubt on outbox.delivery (due_at, email) where settled_at is null and doubted_at is not null;
-- Suspects: several relays died with them. A relay holds one of them at a time, so a guilty one is found out alone.
create index delivery_suspect on outbox.delivery (route, due_at, email) where settled_at is null and orphaned >= 3;
create index delivery_paused on outbox.delivery (paused) where settled_at is null and paused is not null;
create index delivery_late on outbox.delivery (send_before) where settled_at is null and send_before is not null;

-- What happened at each try; appended, never changed. No foreign key: checking it would lock the email's row
-- once per try, and an email with a delivery is never deleted.
create table outbox.attempt (
    email       bigint not null,
    attempt     integer not null,
    relay       integer,
    verdict     text not null check (verdict in ('accepted', 'deferred', 'refused', 'in_doubt', 'withdrawn',
                                                 'quarantined', 'asked', 'resolved', 'expired', 'cancelled',
                                                 'retried', 'suppressed', 'bounced')),
    reply       text not null,
    marked_at   timestamptz,
    settled_at  timestamptz not null default now()
);
create index attempt_email on outbox.attempt (email);
-- It has no key of its own, and a publication of all tables refuses to delete from a table that has neither. Rows are never
-- changed, so this costs only what `outbox prune` deletes, and that only where wal_level is logical. A key would cost an
-- index entry for each try, and on an upgrade all rows would have to be written again.
alter table outbox.attempt replica identity full;

-- Emails that failed and about which nobody has decided: dead letters, and emails of reports that expired. A trigger keeps
-- it, since an index on `state` would make every mark an update with new index entries (PostgreSQL docs, 73.7). An
-- application's own email that expired is as it asked for. A waiver decides too; readers look for it.
create table outbox.failure (
    email  bigint primary key,
    at     timestamptz not null default now()
);

create function outbox.note_failure() returns trigger language plpgsql security definer
    set search_path = pg_catalog, pg_temp as $$
begin
    if new.state = 'expired' and exists (select from outbox.email m where m.id = new.email and m.report is not null)
       or new.state = 'dead'   -- a decision of before its death is not about the dead letter
          and not exists (select from outbox.attempt a
                           where a.email = new.email and a.attempt = new.attempt and a.verdict = 'resolved'
                             and a.settled_at >= new.settled_at) then
        insert into outbox.failure (email) values (new.email) on conflict (email) do nothing;
    else
        delete from outbox.failure where email = new.email;
    end if;
    return null;
end $$;
create trigger delivery_failure_insert after insert on outbox.delivery
    for each row when (new.state in ('dead', 'expired')) execute function outbox.note_failure();
create trigger delivery_failure_update after update of state on outbox.delivery
    for each row when (new.state in ('dead', 'expired') or old.state in ('dead', 'expired'))
    execute function outbox.note_failure();

-- One row per relay session: its id is its identity and, in namespace 1779102894, its advisory lock. While the
-- lock is held the relay lives; when it is free the relay is dead, whatever this table says. `timeline` is the WAL
-- timeline that its session began on: a relay of an earlier one has been through a failover and may know more than
-- the database. `trouble` is what keeps it from its work, `stale` how many of its verdicts came too late to matter. `sent` is how many
-- emails servers have taken from it and `last_reply` what it heard last, both as of its last sweep. `route` is
-- the one that it serves; '' is the usual one. `instance` is the same for all sessions of one process and route, on
-- whichever server, until it stops in order. `told_epoch` is the epoch of the latest barrier (`failover`) before which
-- it has said all that it knows.
create table outbox.relay (
    id           integer generated always as identity primary key,
    host         text not null,
    pid          integer not null,
    backend_pid  integer not null,
    version      text not null,
    timeline     bigint not null default 0,
    started_at   timestamptz not null default now(),
    ended_at     timestamptz,
    stale        integer not null default 0,
    trouble      text,
    sent         bigint not null default 0,
    last_reply   text,
    route        text not null default '',
    instance     text,
    told_epoch   bigint
);
create index relay_open on outbox.relay (id) where ended_at is null;
create index relay_told on outbox.relay (told_epoch) where told_epoch is not null;

-- The barrier after a change of servers, in one row. It stands while `lifted_at` is null: relays claim and mark nothing
-- until all instances in `awaited` have written what they sent, or until `until`, and not before `lift_after`. `epoch`
-- grows each time that it is raised. `kind` is the reason: a relay that came from another server (move), one that had no
-- answer for too long (gap), a new one beside others (start). `moved_epoch` and `moved_at` are the latest `move`.
create table outbox.failover (
    one          boolean primary key default true check (one),
    epoch        bigint not null default 0,
    kind         text not null default 'start' check (kind in ('start', 'gap', 'move')),
    awaited      text[] not null default '{}',
    raised_at    timestamptz not null default now(),
    lift_after   timestamptz not null default now(),
    until        timestamptz not null default now(),
    lifted_at    timestamptz default now(),
    moved_epoch  bigint not null default 0,
    moved_at     timestamptz
);
insert into outbox.failover default values;

-- A way to an SMTP server that is in trouble, for the whole fleet; no row, no trouble. Until `retry_at` nobody
-- connects; then the one relay that moves `retry_at` on probes, and takes the row away when the server works.
create table outbox.route (
    name      text primary key,                         -- a route's name; host:port of the usual one
    since     timestamptz not null default now(),
    reason    text not null,
    failures  integer not null default 1,
    relay     integer,                                  -- who said so last, or who probes
    retry_at  timestamptz not null,
    logins    integer not null default 0 check (logins >= 0)  -- refused in a row: the pause lasts for minutes
);

-- The fleet's rate: whoever moves `next_at` on by n places owns the n moments that it passed over, one email each.
-- `found_rate` is what the mail server takes, in emails a second, as its refusals show (`said`); null while nothing was
-- refused because of the rate. It was found at `found_at`; then nothing is sent for `silence_s`, until `resumes_at`.
create table outbox.pace (
    route       text primary key,                       -- as in `route`
    next_at     timestamptz not null default now(),
    found_rate  double precision,
    found_at    timestamptz,
    resumes_at  timestamptz,
    silence_s   double precision,
    said        text,
    constraint pace_found check (
        num_nulls(found_rate, found_at, resumes_at, silence_s, said) in (0, 5)
        and (found_rate is null or (found_rate > 0 and found_rate <= 1e6 and silence_s between 0 and 3600)))
);

-- How many such moments were given out, by the quarter of an hour: a day's sum is what `daily_max` bounds.
create table outbox.allowance (
    route   text not null,
    since   timestamptz not null,
    emails  bigint not null check (emails >= 0),
    primary key (route, since)
);

-- How far `outbox prune` has come: every row of that table up to this id is pruned.
create table outbox.pruned (
    what   text primary key check (what in ('email', 'report')),
    up_to  bigint not null,
    at     timestamptz not null default now()
);

-- What people decided about emails: who, when, why. The trail of each email says it too.
create table outbox.operation (
    id      bigint generated always as identity primary key,
    at      timestamptz not null default now(),
    who     text not null,
    what    text not null,
    target  text not null,
    why     text not null,
    emails  bigint not null check (emails >= 0)
);

-- What people hold back: a report by its name, or the whole fleet by ''.
create table outbox.pause (
    report  text primary key,
    since   timestamptz not null default now(),
    who     text not null,
    why     text not null
);

-- The latest tick of a report's schedule that the fleet has taken up; no row, none yet. Not done yet, and its
-- `retry_at` is over: another relay may try again. Ticks up to `since` are not followed: the schedule was new then, and
-- `tick_at` is its last tick before that.
create table outbox.schedule (
    report    text primary key,
    tick_at   timestamptz not null,
    done_at   timestamptz,
    failures  integer not null default 0 check (failures >= 0),
    retry_at  timestamptz not null default now(),
    said      text,                                     -- why the last try failed
    since     timestamptz                               -- null: its first tick was followed at once
);

-- A report that goes into a digest instead of an email of its own. `digest` is the report that took it up. No foreign
-- keys: reports are never deleted, and whoever empties `report` by hand need not know of digests.
create table outbox.digest_item (
    report   bigint primary key,
    address  text not null,
    name     text,
    link     text not null,
    digest   bigint
);
create index digest_item_open on outbox.digest_item (address) where digest is null;
create index digest_item_digest on outbox.digest_item (digest) where digest is not null;

-- By which of several routes an email goes: the first rule that fits, '' where none does. `outbox init` writes those
-- of the settings. A domain is that of the recipient; `*.example.com` is each one below it.
create table outbox.rule (
    position  integer primary key,
    route     text not null check (route <> ''),
    report    text,
    domain    text check (domain = lower(domain)),
    check (report is not null or domain is not null)
);

create function outbox.route_of(report text, recipient text) returns text language plpgsql stable
    set search_path = pg_catalog, pg_temp as $$
begin
    return coalesce((
        select r.route from outbox.rule r, lower(split_part(route_of.recipient, '@', -1)) as d (domain)
         where (r.report is null or r.report = route_of.report)
           and (r.domain is null or r.domain = d.domain
                or (r.domain like '*.%' and right(d.domain, length(r.domain) - 1) = substr(r.domain, 2)))
         order by r.position limit 1
    ), '');
end $$;

-- Who gets no more email: of one report, or none at all (''). An address is in lower case, its domain as A-labels.
create table outbox.suppression (
    address  text collate "C" not null check (address <> '' and address = lower(address)),
    report   text not null default '',
    since    timestamptz not null default now(),
    reason   text not null check (reason in ('bounced', 'complained', 'unsubscribed', 'decided')),
    who      text not null,
    why      text not null,
    email    bigint,                                    -- the one that bounced, or that was answered by unsubscribing
    primary key (address, report)
);

-- What came back, each bounce of an email once: `message` is a digest of the bounce, so that reading it again changes
-- nothing. Its trail says what it said. No foreign key, as in `attempt`.
create table outbox.bounce (
    email    bigint not null,
    message  text not null,
    at       timestamptz not null default now(),
    kind     text not null check (kind in ('hard', 'soft', 'complained')),
    status   text,                                      -- RFC 3463: 5.1.1
    proves   boolean not null default false,            -- a server accepted the email: nobody else can have written it
    counts   boolean not null default false,            -- a failure that counts towards `bounces_max`
    primary key (email, message)
);

-- Settles as sent what is in doubt and bounced after its mark: a bounce proves that a server accepted the email. For one
-- email, or without it for all: a bounce may come before the relay gives up waiting for the reply. Gives how many. It runs as
-- the schema's owner, so that the role that reads bounces can change no delivery otherwise. What another transaction decides
-- at this moment is left to it. An email that is pending again, because it was decided to resend it, stays so: that decision
-- counted with its being accepted, and the bounce may be about either try.
create function outbox.settle_bounced(email bigint default null) returns bigint language plpgsql security definer
    set search_path = pg_catalog, pg_temp as $$
declare
    doubtful bigint[] := array[settle_bounced.email];
    settled  bigint;
begin
    if settle_bounced.email is null then
        doubtful := array(select d.email from outbox.delivery d where d.settled_at is null and d.doubted_at is not null);
    end if;
    with chosen as (
        select d.email from outbox.delivery d
         where d.email = any (doubtful) and d.state = 'in_doubt'
           and (select bool_or(b.proves) from outbox.bounce b where b.email = d.email and b.at >= d.marked_at)
         order by d.email for update skip locked
    ), decided as (
        update outbox.delivery d set state = 'sent', settled_at = now(), doubted_at = null
          from chosen c where d.email = c.email
        returning d.email, d.attempt, d.relay, d.marked_at
    ), trail as (
        insert into outbox.attempt (email, attempt, relay, verdict, reply, marked_at)
        select s.email, s.attempt, s.relay, 'resolved', 'a bounce of it proves that a server accepted it: sent', s.marked_at
          from decided s
    )
    select count(*) into settled from decided;
    return settled;
end $$;

-- Secrets that sign the bounce tokens of emails; only the owner reads them. The key that is not retired signs; tokens of a
-- former key stay valid for 30 days. `outbox init --rotate-bounce-key` makes the next.
create table outbox.bounce_key (
    id          smallint primary key check (id between 1 and 999),   -- at most three digits: it is part of each token
    secret      bytea not null check (octet_length(secret) = 32),
    created_at  timestamptz not null default now(),
    retired_at  timestamptz
);
create unique index bounce_key_signs on outbox.bounce_key ((true)) where retired_at is null;
-- A random UUID has 122 random bits from the operating system (PostgreSQL docs, 9.14).
insert into outbox.bounce_key (id, secret)
values (1, sha256(convert_to(concat(gen_random_uuid(), gen_random_uuid(), gen_random_uuid()), 'UTF8')));

-- The tokens of these emails, as `4711k1t` and 16 hexadecimal digits: the email's id, the key's, and a keyed digest
-- (HMAC's nested construction, FIPS 198-1, with a key of constant length and a byte that distinguishes the two passes) of the
-- email's id and its Message-ID, truncated to 64 bits. After a failover that lost emails an id may be given out again; the
-- token of the lost email is not valid for it. Without `key`, the signing key is used. It runs as the schema's owner: relays
-- request the tokens of their claims, and cannot read the key.
create function outbox.bounce_tokens(emails bigint[], key integer default null)
    returns table (email bigint, token text) language plpgsql stable security definer
    set search_path = pg_catalog, pg_temp set standard_conforming_strings = on as $$
begin
    return query
    select m.id, m.id || 'k' || k.id || 't' || left(encode(sha256(k.secret || '\x01' || sha256(
               k.secret || '\x00' || int8send(m.id) || convert_to(m.message_id, 'UTF8'))), 'hex'), 16)
      from outbox.bounce_key k, unnest(bounce_tokens.emails) as n (id)
      join outbox.email m on m.id = n.id and octet_length(m.message_id) <= 998   -- an older row may hold megabytes
     where case when bounce_tokens.key is null then k.retired_at is null
                else k.id = bounce_tokens.key and coalesce(k.retired_at > now() - interval '30 days', true) end;
end $$;

create function outbox.bounce_token(email bigint) returns text language sql stable
    set search_path = pg_catalog, pg_temp as $$
    select t.token from outbox.bounce_tokens(array[bounce_token.email]) as t
$$;

-- The email that a token belongs to; null if it is not valid. Digests are compared, not the tokens: the duration reveals
-- nothing about a guess.
create function outbox.bounce_email(token text) returns bigint language plpgsql stable security definer
    set search_path = pg_catalog, pg_temp set standard_conforming_strings = on as $$
declare
    parts text[] := regexp_match(lower(left(bounce_email.token, 100)), '^([1-9][0-9]{0,18})k([1-9][0-9]{0,2})t[0-9a-f]{16}$');
    id    bigint;
begin
    if parts is null or parts[1]::numeric > 9223372036854775807 then
        return null;
    end if;
    id := parts[1]::bigint;
    return (select t.email from outbox.bounce_tokens(array[id], parts[2]::integer) as t
             where sha256(convert_to(t.token, 'UTF8')) = sha256(convert_to(lower(bounce_email.token), 'UTF8')));
end $$;

-- Why an email to that recipient is not sent, as one sentence; null: it is. `report` is null where it belongs to none.
create function outbox.suppressed(recipient text, report text) returns text language sql stable
    set search_path = pg_catalog, pg_temp as $$
    select format('its address is on the suppression list%s since %s UTC (%s%s)',
                  case when s.report <> '' then ' for ' || s.report end,
                  to_char(s.since at time zone 'UTC', 'YYYY-MM-DD HH24:MI'), s.reason, ': ' || nullif(s.why, ''))
      from outbox.suppression s
     where s.address = lower(suppressed.recipient collate "C") and s.report in ('', coalesce(suppressed.report, ''))
     order by s.report limit 1
$$;

-- `select outbox.unsubscribe(token)`: who got the report of that token gets no more emails of its kind. Gives the report's
-- name, again and again; null: no report has that token. It runs as the schema's owner, so that a web application in
-- outbox_unsubscribe needs no right on any table; without a token it can do nothing. The record names the login that
-- called it. The address is that of the email whose key names the report, which only the owner can change later.
create function outbox.unsubscribe(token text) returns text language plpgsql security definer
    set search_path = pg_catalog, pg_temp as $$
declare
    found_report  text;
    found_address text;
    found_email   bigint;
begin
    select e.report, lower(coalesce(m.recipient, i.address) collate "C"), m.id
      into found_report, found_address, found_email
      from outbox.report r
      join outbox.edition e on e.id = r.edition
      left join outbox.digest_item i on i.report = r.id
      left join outbox.email m on m.key = e.report || '/' || e.period || '/' || r.recipient_key
     where r.token = unsubscribe.token;
    if found_address is null then
        return null;
    end if;
    with added as (
        insert into outbox.suppression (address, report, reason, who, why, email)
        values (found_address, found_report, 'unsubscribed', session_user, 'by the link in an email', found_email)
            on conflict (address, report) do nothing returning 1
    )
    insert into outbox.operation (who, what, target, why, emails)
    select session_user, 'unsubscribe', found_address || ' --report ' || found_report, 'by the link in an email', 0
      from added;
    return found_report;
end $$;

-- The way back, for whoever unsubscribed by mistake. What is suppressed for another reason stays so.
create function outbox.resubscribe(token text) returns text language plpgsql security definer
    set search_path = pg_catalog, pg_temp as $$
declare
    found_report  text;
    found_address text;
begin
    select e.report, lower(coalesce(m.recipient, i.address) collate "C") into found_report, found_address
      from outbox.report r
      join outbox.edition e on e.id = r.edition
      left join outbox.digest_item i on i.report = r.id
      left join outbox.email m on m.key = e.report || '/' || e.period || '/' || r.recipient_key
     where r.token = resubscribe.token;
    with gone as (
        delete from outbox.suppression s
         where s.address = found_address and s.report = found_report and s.reason = 'unsubscribed' returning 1
    )
    insert into outbox.operation (who, what, target, why, emails)
    select session_user, 'resubscribe', found_address || ' --report ' || found_report, 'by the link in an email', 0
      from gone;
    return case when found_address is not null then found_report end;
end $$;

-- Assigns to a report the email under its key that has no report: a failover may lose a report whose email a relay
-- restores. True if it did; false, without a change, if the email has a report or another envelope, or if the key is not
-- the report's. It runs as the schema's owner, so that generate needs no right to change an email.
create function outbox.adopt_email(key text, report bigint, sender text, recipient text) returns boolean
    language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
    update outbox.email m set report = r.id
      from outbox.report r join outbox.edition e on e.id = r.edition
     where m.key = adopt_email.key and m.report is null
       and m.sender = adopt_email.sender and m.recipient = adopt_email.recipient
       and r.id = adopt_email.report and m.key = e.report || '/' || e.period || '/' || r.recipient_key;
    return found;
end $$;

-- An address as it is stored: checked, its domain in lower case, non-ASCII characters in NFC. Raises an exception if it is
-- not valid.
create function outbox.address_of(said text, what text) returns text language plpgsql immutable
    set search_path = pg_catalog, pg_temp set standard_conforming_strings = on as $$
declare
    address text := said;
    dom     text;
begin
    -- Most addresses match this; the rest of the function gives the same result for them.
    if octet_length(said) < 64 and said ~ '^[A-Za-z0-9_+-]+(\.[A-Za-z0-9_+-]+)*@([a-z0-9]+[.-])+[a-z]+$' then
        return said;
    end if;
    if octet_length(said) > 1000 then
        raise exception using errcode = '22023', message = format('%s is too long for an email address', what),
            hint = 'Write one of at most 254 octets, such as user@example.com.';
    end if;
    if said is null or said ~ '[\u0001-\u001f\u007f-\u009f]' then
        raise exception using errcode = '22023', message = format('%s is missing or has a control character', what),
            hint = 'Write an address such as user@example.com.';
    end if;
    dom := lower(split_part(said, '@', -1) collate "C");
    if dom ~ '[^ -~]' then
        raise exception using errcode = '22023', message = format('the domain of %s is not ASCII: %s', what, said),
            hint = 'Write it as A-labels, as in xn--bcher-kva.example.';
    end if;
    if address ~ '[^ -~]' then   -- its server must offer SMTPUTF8 (RFC 6531)
        address := normalize(address, nfc);
    end if;
    if address !~ '^[^[:space:][:cntrl:]@<>",;:()\[\]\\]+@[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?(\.[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?)*$'
       or address ~ '^\.|\.@|\.\.|[\u0080-\u00a0]' or dom ~ '(^|\.)[0-9]+$' or dom ~ '[^.]{64}'
       -- Spaces, format and private characters (Unicode's Zs, Zl, Zp, Cf, Co). [:space:] depends on the database's locale.
       or address ~ ('[\u00ad\u0600-\u0605\u061c\u06dd\u070f\u0890\u0891\u08e2\u1680\u180e\u2000-\u200f\u2028-\u202f'
                     || '\u205f-\u206f\u3000\ue000-\uf8ff\ufeff\ufff9-\ufffb\U000110bd\U000110cd\U00013430-\U0001343f'
                     || '\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0001\U000e0020-\U000e007f\U000f0000-\U0010ffff]')
       or octet_length(split_part(address, '@', 1)) > 64 or octet_length(address) > 254 then
        raise exception using errcode = '22023', message = format('%s is not an email address: %s', what, said),
            hint = 'Write one such as user@example.com.';
    end if;
    return split_part(address, '@', 1) || '@' || dom;
end $$;

-- The key, if a caller may use it. Keys of reports, `<report>/<period>/<recipient key>`, are written by generate alone:
-- with one of them an application would replace a recipient's report by its own email.
create function outbox.checked_key(key text) returns text language plpgsql stable
    set search_path = pg_catalog, pg_temp set standard_conforming_strings = on as $$
declare
    is_of_report boolean;
begin
    if key is null or octet_length(key) > 990 or length(key) > 500 or btrim(key) = ''
       or key ~ '[\u0001-\u001f\u007f-\u009f\u2028\u2029]' then
        raise exception using errcode = '22023',
            message = 'an email needs a key of 1 to 500 characters (990 octets) without control characters',
            hint = 'The key makes it one email, for ever: order-4711/receipt.';
    end if;
    if key ~ '#[0-9]+$' then
        raise exception using errcode = '22023', message = 'an email needs a key that does not end in # and digits',
            hint = 'Further recipients are told apart so: order-4711/receipt#2.';
    end if;
    is_of_report := key ~ '^[^/]*/[0-9]{4}-([Ww][0-9]{2}|[0-9]{2}|[0-9]{2}-[0-9]{2}|[Qq][1-4])/';
    if key ~ '^[^/]*/[0-9]{4}/' then
        is_of_report := exists (select from outbox.definition d where d.report = split_part(checked_key.key, '/', 1));
    end if;
    if is_of_report then
        raise exception using errcode = '22023', message = format('the key %s is one of a report''s email', key),
            hint = 'REPORT/PERIOD/… is kept for reports. Begin it otherwise: invoice/4711/2026-11.';
    end if;
    return key;
end $$;

-- The message with CRLF at the end of every line (RFC 5321 §2.3.8); a lone CR or LF means one to some servers and not
-- to others, which makes one message look like two (SMTP smuggling, CVE-2023-51764). Raises an exception if it has
-- a NUL or a line of more than 998 octets (RFC 5322 §2.1.1).
create function outbox.wire_lines(message bytea) returns bytea language plpgsql immutable
    set search_path = pg_catalog, pg_temp set standard_conforming_strings = on as $$
declare
    encoding text := 'UTF8';
    whole    text;
    place    integer := 1;
begin
    begin
        whole := convert_from(message, 'UTF8');
    exception when character_not_in_repertoire then
        if position('\x00'::bytea in message) > 0 then
            raise exception using errcode = '22023', message = 'the message has a NUL octet',
                hint = 'Encode what is not text as base64 (RFC 2045).';
        end if;
        encoding := 'LATIN1';   -- in which every octet is a character
        whole := convert_from(message, 'LATIN1');
    end;
    if replace(replace(whole, E'\r', ''), E'\n', E'\r\n') <> whole then
        whole := replace(replace(replace(whole, E'\r\n', E'\n'), E'\r', E'\n'), E'\n', E'\r\n');
        message := convert_to(whole, encoding);
    end if;
    -- If each piece of 499 octets has a line end, no line has more than 998. Lines are measured only if a piece has none.
    while place + 498 <= octet_length(message) loop
        if position('\x0a'::bytea in substr(message, place, 499)) = 0 then
            if exists (select from string_to_table(whole, E'\r\n') as line
                        where case when encoding = 'UTF8' then octet_length(line) else length(line) end > 998) then
                raise exception using errcode = '22023', message = 'the message has a line of more than 998 octets',
                    hint = 'Fold header fields at a space, and encode the body as quoted-printable or base64.';
            end if;
            exit;
        end if;
        place := place + 499;
    end loop;
    return message;
end $$;

-- The largest number of octets of a message, from the table's constraint.
create function outbox.message_bytes_max() returns bigint language sql stable
    set search_path = pg_catalog, pg_temp as $$
    select coalesce(max((regexp_match(pg_get_constraintdef(c.oid), '<= ([0-9]+)'))[1]::bigint), 20971520)
      from pg_constraint c where c.conrelid = 'outbox.email'::regclass and c.conname = 'email_message_size'
$$;

-- Raises an exception unless a message of this size may be enqueued for this many recipients.
create function outbox.check_size(octets bigint, recipients integer) returns void language plpgsql stable
    set search_path = pg_catalog, pg_temp as $$
begin
    if octets > 65536 and octets > outbox.message_bytes_max() then
        raise exception using errcode = '22023',
            message = format('the message has %s octets; at most %s are accepted', octets, outbox.message_bytes_max()),
            hint = 'Send a link to what is large, or raise message_bytes_max and run `outbox init`.';
    end if;
    if octets * recipients > 104857600 then
        raise exception using errcode = '22023',
            message = format('%s recipients of %s octets each are more than 104857600 octets', recipients, octets),
            hint = 'Give several emails fewer recipients each.';
    end if;
end $$;

-- Raises an exception unless the header has at most 65536 octets and the subject at most 998 characters: with four octets
-- each, as encoded words, these take less than 16384.
create function outbox.check_header(message bytea) returns void language plpgsql immutable
    set search_path = pg_catalog, pg_temp set standard_conforming_strings = on as $$
declare
    header integer := position('\x0d0a0d0a'::bytea in substr(message, 1, 65540)) - 1;
begin
    if octet_length(message) > 65536 and header not between 0 and 65536 then
        raise exception using errcode = '22023', message = 'the header of the message has more than 65536 octets',
            hint = 'Make its fields shorter, or leave some out.';
    end if;
    if header > 16384 then
        if exists (select from regexp_matches(
                convert_from(substr(message, 1, header), 'LATIN1'),
                '(?:^|\n)[Ss][Uu][Bb][Jj][Ee][Cc][Tt][ \t]*:((?:[^\r\n]|\r\n[ \t])*)', 'g') as s (part)
             where length(s.part[1]) > 16384) then
            raise exception using errcode = '22023', message = 'the subject has more than 998 characters',
                hint = 'Shorten it.';
        end if;
    end if;
end $$;

-- Puts an email into the outbox, in the caller's transaction: true if it is new, false if its key is there already, and
-- then nothing is changed, for ever. The message is `head`, a Message-ID without its brackets, which ends in `domain`, and
-- `tail`. Each recipient has a delivery of its own, so that a refusal of one never mails another again: the first under
-- the key itself, the others as `key#2`, `key#3` and so on. Without `route` the rules say it.
-- In a race for one key the later transaction waits for the end of the earlier one.
-- `enable_seqscan = off` is for the foreign key of `delivery`: a session that first enqueues into tables that were analysed
-- when they were empty would check it by reading all of `email`, for each email until the next ANALYZE.
--
-- It runs as the schema's owner, for callers without a right on any table, so it trusts nothing: each argument is checked,
-- ids and Message-IDs are made here, and `made_by` ends with the name of the login.
create function outbox.put(
    key text, sender text, recipients text[], head bytea, domain text, tail bytea,
    send_at timestamptz default null, send_before timestamptz default null, priority integer default 0,
    route text default null, traceparent text default null, made_by text default null
) returns boolean language plpgsql security definer
    set search_path = pg_catalog, pg_temp set standard_conforming_strings = on set enable_seqscan = off as $$
declare
    id          bigint;
    message_id  text;
    message     bytea;
    sent_from   text;
    addresses   text[] := '{}';
    address     text;
    said        text;
    further     integer;
begin
    key := outbox.checked_key(put.key);
    if put.recipients is null or cardinality(put.recipients) not between 1 and 100 or array_ndims(put.recipients) <> 1 then
        raise exception using errcode = '22023', message = 'an email needs 1 to 100 recipients, in an array of one dimension',
            hint = 'Write array[''user@example.com''].';
    end if;
    sent_from := outbox.address_of(put.sender, 'sender');
    foreach said in array put.recipients loop
        address := outbox.address_of(said, 'recipient');
        if address = any (addresses) then
            raise exception using errcode = '22023', message = format('the recipient %s comes twice', address),
                hint = 'Name each recipient once.';
        end if;
        addresses := addresses || address;
    end loop;
    if put.domain is null or put.domain <> split_part(sent_from, '@', -1) then
        perform outbox.address_of('id@' || put.domain, 'domain');
    end if;
    if put.head is null or put.tail is null then
        raise exception using errcode = '22023', message = 'a message needs a head and a tail',
            hint = 'The head ends in `Message-ID: <`, the tail begins with `>`.';
    end if;
    if octet_length(put.head)::bigint + octet_length(put.tail) > 65536 then
        perform outbox.check_size(octet_length(put.head)::bigint + octet_length(put.tail), cardinality(addresses));
    end if;
    if put.send_at < '1970-01-01 00:00:00+00' or put.send_at >= '3000-01-01 00:00:00+00'
       or put.send_before < '1970-01-01 00:00:00+00' or put.send_before >= '3000-01-01 00:00:00+00' then
        raise exception using errcode = '22023',
            message = format('send_at %s or send_before %s is outside of 1970 to 2999',
                             coalesce(put.send_at::text, '(now)'), coalesce(put.send_before::text, '(never)')),
            hint = 'Leave out send_at to send it now, and send_before if it never expires.';
    end if;
    if put.send_before <= put.send_at then
        raise exception using errcode = '22023', message = 'send_before is not after send_at, so it could never be sent',
            hint = 'Give a later send_before.';
    end if;
    if put.priority is null or put.priority not between 0 and 1 then
        raise exception using errcode = '22023',
            message = format('the priority %s is unknown', coalesce(put.priority::text, 'null')),
            hint = 'Write 0 (normal) or 1 (urgent).';
    end if;
    if put.route <> '' and (octet_length(put.route) > 100 or put.route !~ '^[a-z][a-z0-9_-]*$') then
        raise exception using errcode = '22023', message = format('the route %s is not a valid name', left(put.route, 100)),
            hint = 'Write one such as bulk, as in [routes.bulk].';
    end if;
    if put.traceparent is not null and (octet_length(put.traceparent) > 200
       or put.traceparent !~ '^[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}(-[!-~]*)?$') then
        raise exception using errcode = '22023', message = 'traceparent is not one of W3C Trace Context',
            hint = 'Leave it out, or write 00-<32 hex digits>-<16 hex digits>-01.';
    end if;
    if octet_length(put.made_by) > 300 or put.made_by ~ '[\u0001-\u001f\u007f-\u009f\u2028\u2029]' then
        raise exception using errcode = '22023',
            message = 'made_by has more than 300 octets or a control character', hint = 'Write host, pid 4711.';
    end if;
    id := nextval('outbox.email_id_seq');
    message_id := id || '.' || substr(replace(gen_random_uuid()::text, '-', ''), 1, 16) || '@' || put.domain;
    message := outbox.wire_lines(put.head || convert_to(message_id, 'UTF8') || put.tail);
    if octet_length(message) > 16384 then
        perform outbox.check_size(octet_length(message), cardinality(addresses));
        perform outbox.check_header(message);
    end if;
    made_by := coalesce(nullif(put.made_by, ''), nullif(current_setting('application_name'), ''), 'SQL')
        || ', ' || session_user;
    insert into outbox.email (id, key, sender, recipient, message_id, message, traceparent, made_by)
    values (id, put.key, sent_from, addresses[1], '<' || message_id || '>', message, put.traceparent, put.made_by)
        on conflict on constraint email_key_key do nothing;
    if not found then
        return false;
    end if;
    insert into outbox.delivery (email, due_at, send_before, priority, route)
    values (id, coalesce(put.send_at, now()), put.send_before, put.priority,
            coalesce(put.route, outbox.route_of(null, addresses[1])));
    if cardinality(addresses) > 1 then
        with copy as (
            select nextval('outbox.email_id_seq') as id, r.address, r.number
              from unnest(addresses) with ordinality as r (address, number) where r.number > 1
        ), put_in as (
            insert into outbox.email (id, key, sender, recipient, message_id, message, traceparent, made_by)
            select copy.id, put.key || '#' || copy.number, sent_from, copy.address, '<' || message_id || '>', message,
                   put.traceparent, put.made_by
              from copy
                on conflict on constraint email_key_key do nothing
            returning email.id
        )
        insert into outbox.delivery (email, due_at, send_before, priority, route)
        select copy.id, coalesce(put.send_at, now()), put.send_before, put.priority,
               coalesce(put.route, outbox.route_of(null, copy.address))
          from put_in join copy on copy.id = put_in.id;
        get diagnostics further = row_count;
        if further <> cardinality(addresses) - 1 then
            raise unique_violation using message = format('one of the keys %s#2 to %1$s#%s is taken by another email; '
                'use a key that does not begin as that one does', put.key, cardinality(addresses));
        end if;
    end if;
    perform pg_notify('outbox', '');
    return true;
end $$;

-- What `enqueue` is made of: RFC 5322 in SQL. outbox/mail/header_fields.py, outbox/mail/mailbox.py and outbox/mail/structured_fields.py write the same
-- bytes in Python; the tests run one table of cases through both.

-- The text as a header can hold it: runs of spaces and control characters are one space; no white space at the ends.
create function outbox.one_line(value text) returns text language plpgsql immutable
    set search_path = pg_catalog, pg_temp set standard_conforming_strings = on as $$
begin
    return btrim(regexp_replace(value, '[\u0001-\u0020\u007f-\u009f\u2028\u2029]+', ' ', 'g'),
                 U&' \00A0\1680\2000\2001\2002\2003\2004\2005\2006\2007\2008\2009\200A\202F\205F\3000');
end $$;

-- Raises an exception if a text has a line break or another control character; a tab is allowed.
create function outbox.check_one_line(value text, what text) returns void language plpgsql immutable
    set search_path = pg_catalog, pg_temp set standard_conforming_strings = on as $$
begin
    if value ~ '[\u0001-\u0008\u000a-\u001f\u007f-\u009f\u2028\u2029]' then
        raise exception using errcode = '22023',
            message = format('%s has a line break or another control character', what), hint = 'Write it on one line.';
    end if;
end $$;

-- Encoded words (RFC 2047 §2: at most 75 characters each, never cut within a character), Q where it is shorter, else B.
create function outbox.encoded_words(value text) returns text[] language plpgsql immutable
    set search_path = pg_catalog, pg_temp set standard_conforming_strings = on as $$
declare
    characters text[];
    quoted     text[];
    is_q       boolean;
    one        text;
    run        text := '';
    words      text[] := '{}';
begin
    select array_agg(c order by n), array_agg(q order by n), sum(length(q)) < (sum(octet_length(c)) + 2) / 3 * 4
      into characters, quoted, is_q
      from (select c, n, case when c = ' ' then '_' when c ~ '^[A-Za-z0-9!*+/-]$' then c
                              else regexp_replace(upper(encode(convert_to(c, 'UTF8'), 'hex')), '(..)', '=\1', 'g') end as q
              from string_to_table(value, null) with ordinality as s (c, n)) as each;
    foreach one in array case when is_q then quoted else characters end loop
        if (case when is_q then length(run) + length(one) > 54 else octet_length(run) + octet_length(one) > 39 end) then
            words := words || run;
            run := '';
        end if;
        run := run || one;
    end loop;
    words := words || run;
    if is_q then
        return (select array_agg('=?utf-8?q?' || w || '?=' order by n) from unnest(words) with ordinality as u (w, n));
    end if;
    return (select array_agg('=?utf-8?b?' || replace(encode(convert_to(w, 'UTF8'), 'base64'), E'\n', '') || '?=' order by n)
              from unnest(words) with ordinality as u (w, n));
end $$;

-- A header field, its words spread over lines of at most 76 characters, as far as single words allow. No CRLF at its end.
create function outbox.folded(field text, words text[]) returns text language plpgsql immutable
    set search_path = pg_catalog, pg_temp as $$
declare
    lines text := '';
    line  text := field || ': ' || coalesce(words[1], '');
    word  text;
begin
    foreach word in array words[2:] loop
        if length(line) + 1 + length(word) > 76 then
            lines := lines || line || E'\r\n';
            line := '';
        end if;
        line := line || ' ' || word;
    end loop;
    return lines || line;
end $$;

-- An unstructured field: ASCII that can be folded at its spaces as it is, other text as encoded words.
create function outbox.text_field(field text, value text, word_max integer) returns text language plpgsql immutable
    set search_path = pg_catalog, pg_temp set standard_conforming_strings = on as $$
declare
    line    text := outbox.one_line(value);
    is_text boolean := line ~ '^[ -~]*$' and line !~ '=\?';
begin
    if is_text and length(field) + 2 + length(line) <= 76 then
        return field || ': ' || line;
    end if;
    if is_text and not exists (select from string_to_table(line, ' ') as word where length(word) > word_max) then
        return outbox.folded(field, string_to_array(line, ' '));
    end if;
    return outbox.folded(field, outbox.encoded_words(line));
end $$;

-- A display name as atoms, one quoted string or encoded words (RFC 5322 §3.2.5, RFC 2047 §5); no words for an empty one.
create function outbox.phrase(value text) returns text[] language plpgsql immutable
    set search_path = pg_catalog, pg_temp set standard_conforming_strings = on as $$
declare
    line text := regexp_replace(outbox.one_line(value), '[ \u00a0\u1680\u2000-\u200a\u202f\u205f\u3000]+', ' ', 'g');
begin
    if line = '' then
        return '{}';
    elsif line !~ '^[ -~]*$' or line ~ '=\?' or length(line) > 66 then
        return outbox.encoded_words(line);
    elsif line ~ '^[A-Za-z0-9!#$%&''*+/=?^_`{|}~ -]*$' then
        return array[line];
    end if;
    return array['"' || regexp_replace(line, '(["\\])', '\\\1', 'g') || '"'];
end $$;

-- The words of a list, with a comma after each item but the last; an item is given as a JSON array of words.
create function outbox.listed(items jsonb[]) returns text[] language sql immutable
    set search_path = pg_catalog, pg_temp as $$
    select array_agg(w.word || case when w.n = jsonb_array_length(i.item) and i.n < cardinality(items) then ',' else '' end
                     order by i.n, w.n)
      from unnest(items) with ordinality as i (item, n), jsonb_array_elements_text(i.item) with ordinality as w (word, n)
$$;

-- A body part with its header, up to and including the CRLF before the next boundary: quoted-printable or base64, whichever
-- is shorter, every line end CRLF (RFC 2045 §6.7 and §6.8). After a body that is alone there is no boundary: `is_alone` makes
-- it base64, in which the last CRLF is no part of the text.
create function outbox.body_part(subtype text, content text, parameters text, is_alone boolean default false) returns text language plpgsql immutable
    set search_path = pg_catalog, pg_temp set standard_conforming_strings = on as $$
declare
    raw     constant text := replace(replace(replace(content, E'\r\n', E'\n'), E'\r', E'\n'), E'\n', E'\r\n');
    octets  constant bigint := octet_length(raw);
    groups  constant bigint := (octets + 2) / 3;
    base64  constant bigint := groups * 4 + 2 * ((groups + 18) / 19);   -- its length
    escaped text := raw;
    one     text;
    body    text;
begin
    -- Each octet that is escaped takes three: where base64 is shorter than that already, nothing more has to be known.
    if not is_alone and (octets = 0 or base64 >= octets + 2
       + 2 * (octets - length(regexp_replace(raw, '[^ -<>-~\t\r\n]', '', 'g')))) then
        escaped := replace(raw, '=', '=3D');
        if octets <> length(raw) or raw ~ '[^ -~\t\r\n]' then
            for one in select distinct m.part[1] from regexp_matches(raw, '[^ -~\t\r\n]', 'g') as m (part) loop
                escaped := replace(escaped, one,
                                   regexp_replace(upper(encode(convert_to(one, 'UTF8'), 'hex')), '(..)', '=\1', 'g'));
            end loop;
        end if;
        body := outbox.quoted_lines(escaped) || E'\r\n';
    end if;
    if body is null or base64 > 0 and base64 < length(body) then
        body := replace(rtrim(encode(convert_to(raw, 'UTF8'), 'base64'), E'\n'), E'\n', E'\r\n') || E'\r\n';
        return format(E'Content-Type: text/%s; charset=utf-8%s\r\nContent-Transfer-Encoding: base64\r\n\r\n%s',
                      subtype, parameters, body);
    end if;
    return format(E'Content-Type: text/%s; charset=utf-8%s\r\nContent-Transfer-Encoding: quoted-printable\r\n\r\n%s',
                  subtype, parameters, body);
end $$;

-- Quoted-printable text, its octets escaped already, in lines of at most 76 characters with soft breaks.
create function outbox.quoted_lines(escaped text) returns text language plpgsql immutable
    set search_path = pg_catalog, pg_temp set standard_conforming_strings = on as $$
declare
    line   text;
    octets bytea;   -- of a line, which is ASCII: parts of it are found in constant time
    at     integer;
    size   integer;
    lines  text[] := '{}';
    from_  integer;   -- the first of a line's parts
begin
    foreach line in array string_to_array(escaped, E'\r\n') loop
        from_ := cardinality(lines) + 1;
        if length(line) > 75 then
            octets := convert_to(line, 'UTF8');
            at := 1;
            while octet_length(octets) - at + 1 > 75 loop
                size := case 61 when get_byte(octets, at + 73) then 74 when get_byte(octets, at + 72) then 73 else 75 end;
                lines := lines || (convert_from(substr(octets, at, size), 'UTF8') || '=');   -- never within =XX
                at := at + size;
            end loop;
            line := convert_from(substr(octets, at), 'UTF8');
        end if;
        if right(line, 1) in (' ', E'\t') then   -- no blank stands at the end of a line
            if length(line) = 75 then
                lines := lines || (left(line, -1) || '=');
                line := right(line, 1);
            end if;
            line := left(line, -1) || case right(line, 1) when ' ' then '=20' else '=09' end;
        end if;
        lines := lines || line;
        -- A lone dot ends a message, and old mailbox formats change a line that begins with "From ".
        for number in from_ .. cardinality(lines) loop
            if lines[number] = '.' then
                lines[number] := '=2E';
            elsif left(lines[number], 5) = 'From ' then
                line := (regexp_match(lines[number], '^(?:From )+'))[1];
                lines[number] := repeat(E'=46rom =\r\n', length(line) / 5) || substr(lines[number], length(line) + 1);
            end if;
        end loop;
    end loop;
    return array_to_string(lines, E'\r\n');
end $$;

-- Parses `Name <user@example.com>` or an address alone; raises an exception if it is not valid.
create function outbox.mailbox(said text, what text, out name text, out address text) language plpgsql immutable
    set search_path = pg_catalog, pg_temp set standard_conforming_strings = on as $$
declare
    parts text[];
begin
    if octet_length(said) > 2000 then
        raise exception using errcode = '22023', message = format('%s has more than 2000 octets', what),
            hint = 'Shorten the name before the address.';
    end if;
    if said is null or said ~ '[\u0001-\u001f\u007f-\u009f\u2028\u2029]' then
        raise exception using errcode = '22023', message = format('%s is missing or has a control character', what),
            hint = 'Write an address such as user@example.com, or Name <user@example.com>.';
    end if;
    parts := regexp_match(btrim(said), '^(?:"((?:[^"\\]|\\.)*)"|([^"<>]*)) *<([^<>]*)>$');
    name := coalesce(regexp_replace(parts[1], '\\(.)', '\1', 'g'), parts[2], '');
    address := outbox.address_of(btrim(coalesce(parts[3], said)), what);
end $$;

-- Fields that every email has unless `headers` gives them another value (fields.DEFAULT_FIELDS).
create function outbox.default_fields(headers jsonb) returns text language sql immutable
    set search_path = pg_catalog, pg_temp as $$
    select coalesce(string_agg(d.name || ': ' || d.value || E'\r\n', '' order by d.name), '')
      from (values ('Auto-Submitted', 'auto-generated'), ('X-Auto-Response-Suppress', 'OOF, AutoReply')) as d (name, value)
     where not exists (select from jsonb_each_text(coalesce(nullif(default_fields.headers, 'null'), '{}')) as h (name, value)
                        where lower(h.name) = lower(d.name) and h.value is not null)
$$;

-- A header field of mailboxes, with its CRLF; nothing where there is none.
create function outbox.mailboxes_header(field text, said text[]) returns text language plpgsql immutable
    set search_path = pg_catalog, pg_temp as $$
begin
    if coalesce(cardinality(said), 0) = 0 then
        return '';
    end if;
    return outbox.folded(field, outbox.listed((
        select array_agg(to_jsonb(case when p.words = '{}' then array[m.address] else p.words || ('<' || m.address || '>') end)
                         order by s.number)
          from unnest(said) with ordinality as s (mailbox, number), lateral outbox.mailbox(s.mailbox, field) as m,
               lateral outbox.phrase(m.name) as p (words)))) || E'\r\n';
end $$;

-- The items of a list with commas between them, of a header field; a comma in quotes is text.
create function outbox.header_items(field text, value text) returns text[] language plpgsql immutable
    set search_path = pg_catalog, pg_temp set standard_conforming_strings = on as $$
begin
    if value !~ '^(?:[^"\\]|\\.|"(?:[^"\\]|\\.)*")*$' then
        raise exception using errcode = '22023', message = format('the header %s has a quotation mark without its pair', field),
            hint = 'Write "…", and \" within it.';
    end if;
    return (select coalesce(array_agg(btrim(m.part[1]) order by m.n), '{}')
              from regexp_matches(value, '(?:[^",\\]|\\.|"(?:[^"\\]|\\.)*")+', 'g') with ordinality as m (part, n));
end $$;

-- A header field in the syntax that its name has, with its CRLF. Programs read structured fields (RFC 5322 §2.2.2): they are
-- folded, and text is encoded only in a phrase or a comment of theirs (RFC 2047 §5). Every other field is free text.
create function outbox.header_field(field text, value text) returns text language plpgsql immutable
    set search_path = pg_catalog, pg_temp set standard_conforming_strings = on as $$
declare
    word_max constant integer := 998 - length(field) - 2;
    kind  text := lower(field collate "C");
    line  text := outbox.one_line(value);
    items text[];
    words text[];
    parts text[];
    phrases jsonb[];
begin
    if kind in ('sender', 'resent-sender', 'from', 'to', 'cc', 'bcc', 'reply-to', 'resent-from', 'resent-to', 'resent-cc',
                'resent-bcc', 'errors-to', 'disposition-notification-to', 'return-receipt-to', 'mail-followup-to',
                'mail-reply-to') then
        items := outbox.header_items(field, line);
        if cardinality(items) = 0 or cardinality(items) > 1 and kind in ('sender', 'resent-sender') then
            raise exception using errcode = '22023',
                message = format('the header %s has %s addresses', field, cardinality(items)),
                hint = 'Write Name <user@example.com>, and put a name with a comma into quotation marks.';
        end if;
        return outbox.mailboxes_header(field, items);
    elsif kind = 'keywords' then
        select array_agg(to_jsonb(outbox.phrase(
                   case when i.item ~ '^"(?:[^"\\]|\\.)*"$'
                        then regexp_replace(substr(i.item, 2, length(i.item) - 2), '\\(.)', '\1', 'g') else i.item end))
               order by i.n)
          into phrases from unnest(outbox.header_items(field, line)) with ordinality as i (item, n);
        words := outbox.listed(phrases);
        if words is null or '[]' = any (phrases) then
            raise exception using errcode = '22023', message = format('the header %s has an empty phrase', field),
                hint = 'Write words with commas between them.';
        end if;
    elsif kind = 'list-id' then
        parts := regexp_match(line, '^(?:"((?:[^"\\]|\\.)*)"|([^"<>]*)) *<([!-;=?-~]+)>$');
        if line ~ '^[!-;=?-~]+$' then
            words := array['<' || line || '>'];
        elsif parts is null then
            raise exception using errcode = '22023', message = format('the header %s is not a list''s id', field),
                hint = 'Write Name <list.example.com> (RFC 2919).';
        else
            words := outbox.phrase(coalesce(regexp_replace(parts[1], '\\(.)', '\1', 'g'), parts[2]))
                || ('<' || parts[3] || '>');
        end if;
    elsif kind in ('message-id', 'in-reply-to', 'references', 'resent-message-id', 'content-id', 'original-message-id',
                   'supersedes', 'obsoletes', 'date', 'resent-date', 'expires', 'expiry-date', 'reply-by',
                   'deferred-delivery', 'latest-delivery-time', 'list-help', 'list-unsubscribe', 'list-unsubscribe-post',
                   'list-subscribe', 'list-post', 'list-owner', 'list-archive', 'archived-at', 'feedback-id',
                   'auto-submitted', 'precedence', 'importance', 'priority', 'sensitivity', 'content-language',
                   'accept-language', 'content-location', 'content-base', 'content-disposition', 'content-type',
                   'content-transfer-encoding', 'mime-version', 'original-recipient', 'authentication-results',
                   'received-spf', 'arc-seal', 'arc-message-signature', 'arc-authentication-results',
                   'require-recipient-valid-since', 'mt-priority', 'tls-required', 'bimi-selector', 'autocrypt') then
        if line ~ '[^ -~]' then   -- it may be in a comment in parentheses (RFC 2047 §5 (2))
            select string_agg(case when m.part[1] ~ '^\(' and m.part[1] ~ '[^ -~]'
                                   then '(' || array_to_string(outbox.encoded_words(
                                            substr(m.part[1], 2, length(m.part[1]) - 2)), ' ') || ')'
                                   else m.part[1] end, '' order by m.n)
              into line
              from regexp_matches(line, '<[^<>]*>|"[^"]*"|\([^()]*\)|[^<"(]+|[<"(]', 'g') with ordinality as m (part, n);
        end if;
        if line = '' then
            raise exception using errcode = '22023', message = format('the header %s is empty', field),
                hint = 'Leave it out.';
        elsif line ~ '[^ -~]' then
            raise exception using errcode = '22023',
                message = format('the header %s has a character beyond ASCII outside of a comment in parentheses', field),
                hint = 'Percent-encode it in a URL, as %C3%BC, or leave it out (RFC 2047 §5).';
        end if;
        if exists (select from string_to_table(line, ' ') as word where length(word) >= 76) then
            -- Ids and URLs side by side: white space may be put between them (RFC 5322 §3.6.4, RFC 2369 §2).
            line := regexp_replace(line, '>(,?)<', '>\1 <', 'g');
        end if;
        words := string_to_array(line, ' ');
    else
        return outbox.text_field(field, line, word_max) || E'\r\n';
    end if;
    if exists (select from unnest(words) as word where length(word) > word_max) then
        raise exception using errcode = '22023',
            message = format('the header %s has a part of more than %s octets without a space', field, word_max),
            hint = 'Shorten it: it cannot be folded into lines of 998 octets (RFC 5322 §2.1.1).';
    end if;
    return outbox.folded(field, words) || E'\r\n';
end $$;

-- `select outbox.enqueue(key => …, sender => …, recipient => …, subject => …, body_text => …, body_html => …)`: an email of
-- an application's own, in its own transaction; true if it is new, false if its key is there already. Several
-- recipients are given as `recipients`; each is sent to by itself, and those of `bcc` stand in no header. `priority` is
-- normal or urgent; without `route` the rules say it. `calendar` is an iCalendar object with its METHOD, an invitation.
create function outbox.enqueue(
    key text, sender text, recipient text default null, subject text default '', body_text text default null,
    body_html text default null, recipients text[] default null, cc text[] default null, bcc text[] default null,
    reply_to text[] default null, headers jsonb default null, send_at timestamptz default null,
    send_before timestamptz default null, priority text default 'normal', route text default null,
    calendar text default null
) returns boolean language plpgsql set search_path = pg_catalog, pg_temp set standard_conforming_strings = on as $$
declare
    visible   text[];
    addresses text[];
    from_name text;
    from_address text;
    boundary  text := '=_' || substr(replace(gen_random_uuid()::text, '-', ''), 1, 24);
    further   text := '';
    given     text[] := '{}';
    body      text;
    method    text;
    part      record;
begin
    if coalesce(enqueue.body_text, enqueue.body_html) is null then
        raise exception using errcode = '22023', message = 'an email needs body_text or body_html, or both',
            hint = 'An empty one is given as an empty text.';
    end if;
    if coalesce(octet_length(enqueue.body_text), 0)::bigint + coalesce(octet_length(enqueue.body_html), 0)
       + coalesce(octet_length(enqueue.calendar), 0) > 104857600 then
        raise exception using errcode = '22023', message = 'the bodies have more than 104857600 octets',
            hint = 'Send a link to what is large.';
    end if;
    if length(enqueue.subject) > 998 then
        raise exception using errcode = '22023', message = 'the subject has more than 998 characters',
            hint = 'Shorten it.';
    end if;
    perform outbox.check_one_line(enqueue.subject, 'the subject');
    if jsonb_typeof(enqueue.headers) not in ('object', 'null') or octet_length(enqueue.headers::text) > 65536 then
        raise exception using errcode = '22023', message = 'headers is not an object, or has more than 65536 octets',
            hint = 'Write {"X-Order": "4711"}.';
    end if;
    if enqueue.priority is null or enqueue.priority not in ('urgent', 'normal') then
        raise exception using errcode = '22023',
            message = format('the priority %s is unknown', coalesce(left(enqueue.priority, 100), 'null')),
            hint = 'Write urgent or normal.';
    end if;
    if array_ndims(enqueue.recipients) > 1 or array_ndims(enqueue.cc) > 1 or array_ndims(enqueue.bcc) > 1
       or array_ndims(enqueue.reply_to) > 1 then
        raise exception using errcode = '22023', message = 'an array of addresses has more than one dimension',
            hint = 'Write array[''ada@example.com'', ''bob@example.com''].';
    end if;
    visible := coalesce(enqueue.recipients, '{}') || case when enqueue.recipient is null then '{}' else array[enqueue.recipient] end;
    if cardinality(visible) + coalesce(cardinality(enqueue.cc), 0) + coalesce(cardinality(enqueue.bcc), 0) > 100
       or cardinality(enqueue.reply_to) > 100 then
        raise exception using errcode = '22023', message = 'an email has at most 100 recipients, and as many reply_to',
            hint = 'Give several emails fewer recipients each.';
    end if;
    select m.name, m.address into from_name, from_address from outbox.mailbox(enqueue.sender, 'sender') as m;
    select array_agg(address order by number) into addresses from (
        select distinct on (m.address) m.address, s.number
          from unnest(visible || coalesce(enqueue.cc, '{}') || coalesce(enqueue.bcc, '{}')) with ordinality as s (said, number),
               lateral outbox.mailbox(s.said, 'recipient') as m
         order by m.address, s.number) as each;
    if addresses is null then
        raise exception using errcode = '22023', message = 'an email needs a recipient, recipients, cc or bcc',
            hint = 'Write recipient => ''user@example.com''.';
    end if;
    for part in select name, value from jsonb_each_text(coalesce(nullif(enqueue.headers, 'null'), '{}')) as h (name, value) loop
        continue when part.value is null;
        if part.name !~ '^[!-9;-~]{1,64}$' or lower(part.name) in (
            'from', 'to', 'cc', 'bcc', 'reply-to', 'subject', 'date', 'message-id', 'list-id',
            'mime-version', 'content-type', 'content-transfer-encoding',
            'dkim-signature', 'return-path', 'delivered-to', 'received', 'x-outbox-redirected-from') then
            raise exception using errcode = '22023',
                message = format('the header %s cannot be given: its name is not valid, or outbox writes it', left(part.name, 100)),
                hint = 'Use letters, digits and hyphens, as in X-Order.';
        end if;
        if lower(part.name) = any (given) then
            raise exception using errcode = '22023',
                message = format('the header %s is given twice, in small and in capital letters', part.name),
                hint = 'Give it once.';
        end if;
        given := given || lower(part.name);
        perform outbox.check_one_line(part.value, 'the header ' || part.name);
        further := further || outbox.header_field(part.name, part.value);
    end loop;
    if enqueue.calendar is not null then   -- its part has to repeat its METHOD (RFC 6047 §2.4)
        calendar := ltrim(enqueue.calendar, U&'\FEFF\000D\000A ');
        select max(upper(m.part[1])) into method
          from regexp_matches(calendar, '^METHOD(?:;[^:\r\n]*)?:[ \t]*([A-Za-z-]{1,40})[ \t]*\r?$', 'ign') as m (part)
        having count(distinct upper(m.part[1])) = 1;
        if upper(left(calendar, 15)) <> 'BEGIN:VCALENDAR' or method is null then
            raise exception using errcode = '22023', message = 'the calendar is no iCalendar object with one METHOD',
                hint = 'Begin it with BEGIN:VCALENDAR, and write METHOD:REQUEST into it.';
        end if;
    end if;
    -- The last alternative is the richest (RFC 2046 §5.1.4).
    for part in select name, content, more from (values (1, 'plain', enqueue.body_text, ''), (2, 'html', enqueue.body_html, ''),
                    (3, 'calendar', calendar, '; method=' || method)) as p (number, name, content, more)
                 where content is not null order by number loop
        body := coalesce(body, '') || case when body is null then '' else '--' || boundary || E'\r\n' end
            || outbox.body_part(part.name, part.content, part.more,
                                num_nonnulls(enqueue.body_text, enqueue.body_html, enqueue.calendar) = 1);
    end loop;
    if num_nonnulls(enqueue.body_text, enqueue.body_html, enqueue.calendar) > 1 then
        body := 'Content-Type: multipart/alternative; boundary="' || boundary || E'"\r\n\r\n--' || boundary || E'\r\n'
            || body || '--' || boundary || E'--\r\n';
    end if;
    return outbox.put(
        enqueue.key, from_address, addresses,
        convert_to(outbox.mailboxes_header('From', array[enqueue.sender]) || outbox.mailboxes_header('To', visible)
            || outbox.mailboxes_header('Cc', enqueue.cc) || outbox.mailboxes_header('Reply-To', enqueue.reply_to)
            || outbox.text_field('Subject', coalesce(enqueue.subject, ''), 66) || E'\r\nDate: '
            || to_char(now() at time zone 'UTC', 'Dy, DD Mon YYYY HH24:MI:SS') || E' +0000\r\nMessage-ID: <', 'UTF8'),
        split_part(from_address, '@', -1),
        convert_to(E'>\r\n' || outbox.default_fields(enqueue.headers) || further
            || E'MIME-Version: 1.0\r\n' || body, 'UTF8'),
        enqueue.send_at, enqueue.send_before, (enqueue.priority = 'urgent')::integer, enqueue.route);
end $$;

-- The facts that several readers show, each defined once: `outbox status`, `list`, `watch` and `audit`, the board, the
-- metrics and the dead man's switch all read these views. They are no public interface: any version may change them.
--
-- A view costs only what is asked of it, so readers put a condition on its own key (`where edition = any ($1)`). A join to
-- a view could make Postgres compute the view for all editions first, where its statistics are old. Each `offset 0` keeps
-- its subquery from being joined as a whole: it is looked up row by row, by the index of its condition.

-- Failures about which no person has decided (`outbox resolve --discard`, `outbox waive`), of any age.
create view outbox.undecided_failure as
select f.email, d.state, r.edition, r.recipient_key
  from outbox.failure f
 cross join lateral (select state from outbox.delivery where email = f.email offset 0) d
 cross join lateral (select report from outbox.email where id = f.email offset 0) m
  left join lateral (select edition, recipient_key from outbox.report where id = m.report offset 0) r on true
 where d.state in ('dead', 'expired')
   and not exists (select from outbox.waiver w
                    where w.edition = r.edition and w.recipient_key = r.recipient_key offset 0);

-- What became of an email: waiting, sent, in_doubt, failed, cancelled or suppressed. A dead letter about which a person has
-- decided is cancelled. `is_bounced`: a server accepted it, and it came back.
create view outbox.delivery_outcome as
select d.email, d.state,
       case when d.state in ('sent', 'in_doubt') then d.state
            when d.state in ('pending', 'sending') then 'waiting'
            when d.state = 'cancelled'
            then case (select a.verdict from outbox.attempt a where a.email = d.email order by a.settled_at desc limit 1)
                 when 'suppressed' then 'suppressed' else 'cancelled' end
            when d.state = 'dead' and not exists (select from outbox.failure f where f.email = d.email offset 0)
            then 'cancelled'
            else 'failed' end as outcome,
       d.state = 'sent' and exists (select from outbox.bounce b where b.email = d.email
                                       and b.kind in ('hard', 'complained') offset 0) as is_bounced
  from outbox.delivery d;

-- What became of a report: as its email, or `collected` while it waits for a digest. A report that a digest took up is what
-- the digest is. It is cancelled if it failed and a person has decided that nothing is owed to its recipient.
create view outbox.report_outcome as
select r.edition, r.recipient_key, r.id as report, d.email, d.state,
       case when i.report is not null and i.digest is null then 'collected'
            when d.outcome = 'failed' and exists (select from outbox.waiver w where w.edition = r.edition
                                                     and w.recipient_key = r.recipient_key offset 0) then 'cancelled'
            else coalesce(d.outcome, 'failed') end as outcome,
       coalesce(d.is_bounced, false) as is_bounced,
       exists (select from outbox.waiver w
                where w.edition = r.edition and w.recipient_key = r.recipient_key offset 0) as is_waived
  from outbox.report r
  left join lateral (select report, digest from outbox.digest_item where report = r.id offset 0) i on true
  left join lateral (select id from outbox.email where report = coalesce(i.digest, r.id) offset 0) m on true
  left join lateral (select email, state, outcome, is_bounced from outbox.delivery_outcome
                      where email = m.id offset 0) d on true;

-- Recipients of an edition without a report and without a waiver, as the latest complete look of `generate` found them.
create view outbox.missing_report as
select u.edition, u.recipient_key, u.reason
  from outbox.unreached u
 where not exists (select from outbox.report r
                    where r.edition = u.edition and r.recipient_key = u.recipient_key offset 0)
   and not exists (select from outbox.waiver w
                    where w.edition = u.edition and w.recipient_key = u.recipient_key offset 0);

-- What became of an edition: its reports by their outcome, and recipients without one. `bounced` are of those that are sent.
create view outbox.edition_outcome as
select e.id as edition, o.made, o.sent, o.waiting, o.in_doubt, o.failed, o.cancelled,
       (select count(*) from outbox.missing_report m where m.edition = e.id) as missing,
       (select count(*) from outbox.waiver w where w.edition = e.id
           and not exists (select from outbox.report r
                            where r.edition = w.edition and r.recipient_key = w.recipient_key offset 0)) as waived,
       o.collected, o.suppressed, o.bounced
  from outbox.edition e
 cross join lateral (
    select count(*) as made,
           count(*) filter (where c.outcome = 'sent') as sent,
           count(*) filter (where c.outcome = 'waiting') as waiting,
           count(*) filter (where c.outcome = 'in_doubt') as in_doubt,
           count(*) filter (where c.outcome = 'failed') as failed,
           count(*) filter (where c.outcome = 'cancelled') as cancelled,
           count(*) filter (where c.outcome = 'collected') as collected,
           count(*) filter (where c.outcome = 'suppressed') as suppressed,
           count(*) filter (where c.is_bounced) as bounced
      from (select outcome, is_bounced from outbox.report_outcome where edition = e.id offset 0) c
 ) o;

-- What needs a person: emails (in_doubt, failed), recipients without a report (missing) and editions (unfinished, empty).
-- Editions of more than 40 days ago are history. A condition on `kind` leaves only its own part to be read.
create view outbox.needs_attention as
select 'in_doubt' as kind, null::integer as edition, d.email, d.state, null::text as recipient_key, null::text as reason,
       d.due_at
  from outbox.delivery d
 where d.settled_at is null and d.doubted_at is not null
union all
select 'failed', f.edition, f.email, f.state, f.recipient_key, null, null
  from outbox.undecided_failure f
 where not exists (select from outbox.edition e
                    where e.id = f.edition and e.created_at <= now() - interval '40 days' offset 0)
union all
select 'missing', e.id, null, null, m.recipient_key, m.reason, null
  from outbox.edition e join outbox.missing_report m on m.edition = e.id
 where e.created_at > now() - interval '40 days' and e.done_elsewhere_at is null
   and (e.looked_at is not null or e.completed_at is not null)
union all   -- the latest look was of a version before 8, which recorded only how many recipients there are
select 'missing', e.id, null, null, null, null, null
  from outbox.edition e
 cross join lateral generate_series(1, least(10000, greatest(0,
       e.expected - (select count(*) from outbox.report r where r.edition = e.id)
       - (select count(*) from outbox.waiver w
           where w.edition = e.id and not exists (
                 select from outbox.report r
                  where r.edition = w.edition and r.recipient_key = w.recipient_key offset 0)))))
 where e.created_at > now() - interval '40 days' and e.done_elsewhere_at is null
   and e.looked_at is null and e.completed_at is null
union all
select 'unfinished', e.id, null, null, null, null, null
  from outbox.edition e
 where e.expected is null and e.completed_at is null
   and e.created_at > now() - interval '40 days' and e.created_at < now() - interval '1 hour'
union all
select 'empty', e.id, null, null, null, null, null
  from outbox.edition e
 where e.expected = 0 and not e.may_be_empty and e.completed_at is null
   and e.created_at > now() - interval '40 days';

-- Sessions of the board. The browser's cookie holds a random value, and `id` is its SHA-256, so nothing in this table is
-- enough to sign in. A session ends when it expires, or by sign-out.
create table outbox.board_session (
    id          bytea primary key check (octet_length(id) = 32),
    name        text not null check (name <> '' and octet_length(name) <= 500),
    created_at  timestamptz not null default now(),
    expires_at  timestamptz not null check (expires_at > created_at and expires_at < 'infinity')
);
create index board_session_expires on outbox.board_session (expires_at);

-- By default every role may call a function; `outbox init --roles` grants each to the roles that need it.
revoke all on all functions in schema outbox from public;

insert into outbox.schema_version (version, compatible) values (9, 2);
