package engine

import (
	"context"
	"slices"
	"testing"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// informed is a Client of servers with these INFO texts.
type informed []string

func (informed) Do(_ context.Context, args []any, _ int) (Reply, error) { return probeReply(args), nil }
func (i informed) Info(context.Context) ([]string, error)               { return i, nil }
func (informed) Close() error                                           { return nil }

func TestHealthNamesTheServer(t *testing.T) {
	for _, test := range []struct {
		infos         []string
		kind, version string
		notices       []string
	}{
		{[]string{"# Server\r\nredis_version:4.0.14\r\nredis_mode:standalone\r\nexecutable:/usr/bin/redis-server\r\n"}, "redis", "4.0.14", []string{"version"}},
		{[]string{"# Server\r\nredis_version:5.0.14\r\nredis_mode:standalone\r\nexecutable:/usr/bin/redis-server\r\n"}, "redis", "5.0.14", nil},
		{[]string{"# Server\r\nredis_version:6.2.14\r\nredis_git_sha1:00000000\r\n"}, "redis", "6.2.14", nil},
		{[]string{"# Server\r\nredis_version:7.4.2\r\nredis_git_sha1:00000000\r\n"}, "redis", "7.4.2", nil},
		{[]string{"# Server\r\nredis_version:8.0.0\r\nredis_git_sha1:00000000\r\nredis_git_dirty:1\r\n"}, "redis", "8.0.0", nil},
		{[]string{"# Server\r\nredis_version:7.2.4\r\nserver_name:valkey\r\nvalkey_version:8.1.1\r\n"}, "valkey", "8.1.1", nil},
		{[]string{"# Server\r\nredis_version:7.2.4\r\nserver_name:valkey\r\nvalkey_version:9.1.2\r\nserver_mode:standalone\r\n"}, "valkey", "9.1.2", nil},
		{[]string{"# Server\r\nredis_version:7.4.0\r\ndragonfly_version:df-v1.40.1\r\nredis_mode:standalone\r\n"}, "dragonfly", "df-v1.40.1", nil},
		{[]string{"# Server\r\ngarnet_version:1.1.1\r\nos:Unix 6.8.0.106\r\nredis_version:7.4.3\r\n"}, "garnet", "1.1.1", nil},
		{[]string{"# Server\r\nversion:2.8.0\r\nkvrocks_version:2.8.0\r\nredis_version:4.0.0\r\n"}, "kvrocks", "2.8.0", nil},
		{[]string{"# Server\r\nredis_version:6.3.4\r\nredis_git_sha1:7e7e5e57\r\nexecutable:/data/keydb-server\r\n# KeyDB\r\nmvcc_depth:0\r\n"}, "keydb", "6.3.4", nil},
		{[]string{"# Clients\r\nconnected_clients:1\r\n# Stats\r\ntotal_connections_received:1\r\n"}, "", "", nil}, // miniredis
		{[]string{"redis_version:7.2.4\r\nvalkey_version:9.0.0\r\n", "redis_version:7.2.4\r\nvalkey_version:8.0.1\r\n"}, "valkey", "8.0.1", nil},
	} {
		var told []string
		s, err := New(informed(test.infos), false, Options{Notice: func(n quota.Notice) { told = append(told, n.Name) }})
		if err != nil {
			t.Fatal(err)
		}
		got, err := s.Health(bg)
		if want := (driver.Health{Kind: test.kind, Version: test.version}); got != want || err != nil || !slices.Equal(told, test.notices) {
			t.Errorf("Health of %q: got %+v, error %v, notices %q; want %+v and notices %q", test.infos, got, err, told, want, test.notices)
		}
	}
}
