-- Three people who did something last week: the tables that the queries in outbox.toml read.
create table people (id int primary key, email text not null, name text not null, active boolean not null default true);
create table progress (person_id int not null references people, day timestamptz not null, done int not null);
insert into people (id, email, name)
select n, 'p' || n || '@example.com', 'Person ' || n from generate_series(1, 3) n;
insert into progress (person_id, day, done)
select n, now() - d * interval '1 day', d from generate_series(1, 3) n, generate_series(1, 14) d;
