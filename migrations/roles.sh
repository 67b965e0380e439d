#!/bin/sh
# Makes the four roles of roles.sql in the PostgreSQL of compose.yaml, each with its password, and gives the database to
# the migrator. PostgreSQL's image runs it when it makes the database. In one that is there already, run it by hand:
#
#     docker compose exec postgres sh /docker-entrypoint-initdb.d/roles.sh
#
# It can be repeated, and is how a changed password gets into PostgreSQL.
set -eu

psql -X -q -v ON_ERROR_STOP=1 -U "$POSTGRES_USER" -d "${POSTGRES_DB:-$POSTGRES_USER}" -f /roles.sql -f - <<'END'
\set password `cat /run/secrets/migrator_password`
ALTER ROLE :"migrator" PASSWORD :'password';
\set password `cat /run/secrets/app_password`
ALTER ROLE :"app" PASSWORD :'password';
\set password `cat /run/secrets/relay_password`
ALTER ROLE :"relay" PASSWORD :'password';
\set password `cat /run/secrets/viewer_password`
ALTER ROLE :"viewer" PASSWORD :'password';
-- So that the migrator may run roles.sql too.
ALTER DATABASE :"database" OWNER TO :"migrator";
END
