package engine

import (
	"fmt"
	"strings"
	"testing"

	"github.com/redis/go-redis/v9"

	"github.com/fleetquota/fleetquota/internal/redisserver"
	"github.com/fleetquota/fleetquota/quota"
)

// The server says in which slot the keys of charges lie, and so do we.
func TestSlotIsTheServers(t *testing.T) {
	server := redisserver.Start(t, "--cluster-enabled", "yes")
	client := redis.NewClient(&redis.Options{Addr: server.Addr()})
	defer client.Close()
	rng := random(t)
	keys := []string{"a", "}", "{", "a{b}", "{a}b", "\x00", "%", "日本", strings.Repeat("}", 512), "foo/bar", "}/x", "a/{b}"}
	for range 5_000 {
		b := make([]byte, 1+rng.IntN(20))
		for i := range b {
			b[i] = byte(rng.IntN(128))
		}
		if key := string(b); quota.CheckKey(key) == nil {
			keys = append(keys, key)
		}
	}
	limit := limitOf("n", window(1))
	for _, prefix := range []string{DefaultPrefix, "p", "a%b/c:"} {
		s, err := New(fake(nil), true, Options{Prefix: prefix})
		if err != nil {
			t.Fatal(err)
		}
		pipe := client.Pipeline()
		for _, key := range keys {
			c := quota.Charge{Limit: limit, Key: key, ID: key}
			pipe.ClusterKeySlot(bg, s.key(&c))
			pipe.ClusterKeySlot(bg, s.idKey(&c))
		}
		cmds, err := pipe.Exec(bg)
		if err != nil {
			t.Fatal(err)
		}
		for i, cmd := range cmds {
			key := keys[i/2]
			want := cmd.(*redis.IntCmd).Val()
			if parts := bySlot([]quota.Charge{{Limit: limit, Key: key}}); int64(parts[0].slot) != want {
				t.Errorf("%q: slot %d, the server says %d", key, parts[0].slot, want)
			}
		}
	}
	if slot([]byte("123456789")) != 0x31C3 { // from the Redis Cluster specification
		t.Error("not the CRC of the specification")
	}
}

func TestBySlot(t *testing.T) {
	var cs []quota.Charge
	for i := range 60 {
		cs = append(cs, quota.Charge{Limit: limitOf("n", window(1)), Key: fmt.Sprintf("g%d/%d", i%7, i)})
	}
	parts := bySlot(cs)
	if len(parts) != 7 {
		t.Fatalf("%d parts of 7 groups", len(parts))
	}
	for p, part := range parts {
		for j, i := range part.places {
			if want := p + 7*j; i != want {
				t.Errorf("part %d has charge %d in place %d, not %d", p, i, j, want)
			}
		}
	}
}
