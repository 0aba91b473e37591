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
		slots := make([]uint16, len(keys))
		for i, key := range keys {
			c := quota.Charge{Limit: limit, Key: key, ID: key}
			var to target
			s.locate(&to, &c)
			slots[i] = s.slotOf(&to)
			pipe.ClusterKeySlot(bg, to.key)
			pipe.ClusterKeySlot(bg, s.idKey(&c))
		}
		cmds, err := pipe.Exec(bg)
		if err != nil {
			t.Fatal(err)
		}
		for i, cmd := range cmds {
			if got, want := int64(slots[i/2]), cmd.(*redis.IntCmd).Val(); got != want {
				t.Errorf("slot of key %q: got %d, the server wants %d", keys[i/2], got, want)
			}
		}
	}
	if got := slot("{123456789}"); got != 0x31C3 { // from the Redis Cluster specification
		t.Errorf("slot of 123456789: got %#x, want 0x31C3", got)
	}
}

func TestPartsBySlot(t *testing.T) {
	s := newStore(t, true, nil)
	q := &list{targets: make([]target, 60)}
	for i := range q.targets {
		q.charges = append(q.charges, quota.Charge{Limit: limitOf("n", window(1)), Key: fmt.Sprintf("g%d/%d", i%7, i)})
	}
	parts := s.partsOf(q, s.together)
	if len(parts) != 7 {
		t.Fatalf("parts of 7 groups: got %d, want 7", len(parts))
	}
	for p, part := range parts {
		for j, got := range part.indexes {
			if want := p + 7*j; got != want {
				t.Errorf("charge %d of part %d: got %d, want %d", j, p, got, want)
			}
		}
	}
}
