package goredis_test

import (
	"errors"
	"strings"
	"testing"

	"github.com/redis/go-redis/v9"

	"github.com/fleetquota/fleetquota/backend/goredis"
	"github.com/fleetquota/fleetquota/quota"
)

// wrapper hides the client's own methods from a type switch.
type wrapper struct{ *redis.Client }

func TestNewRefuses(t *testing.T) {
	ring := redis.NewRing(&redis.RingOptions{Addrs: map[string]string{"a": "127.0.0.1:1"}})
	defer ring.Close()
	plain := redis.NewClient(&redis.Options{Addr: "127.0.0.1:1"})
	defer plain.Close()
	deaf := redis.NewClusterClient(&redis.ClusterOptions{Addrs: []string{"127.0.0.1:1"}, MaxRedirects: -1})
	defer deaf.Close()
	for _, test := range []struct {
		client redis.UniversalClient
		says   []string
	}{
		{nil, []string{"nil", "*redis.Client", "*redis.ClusterClient"}},
		{(*redis.Client)(nil), []string{"nil *redis.Client"}},
		{(*redis.ClusterClient)(nil), []string{"nil *redis.ClusterClient"}},
		{ring, []string{"*redis.Ring", "accepted"}},
		{wrapper{plain}, []string{"goredis_test.wrapper", "accepted"}},
		{&wrapper{plain}, []string{"*goredis_test.wrapper", "accepted"}},
		{deaf, []string{"MaxRedirects", "-1", "accepted"}},
	} {
		s, err := goredis.New(test.client, nil)
		if s != nil || !errors.Is(err, quota.ErrInvalid) {
			t.Errorf("%T: got %v, error %v; want no store and ErrInvalid", test.client, s, err)
			continue
		}
		for _, word := range test.says {
			if !strings.Contains(err.Error(), word) {
				t.Errorf("%T: got error %q, want one that says %q", test.client, err, word)
			}
		}
	}
}

// A client that does not heed deadlines is accepted, with a notice.
func TestDeadlineNotice(t *testing.T) {
	for _, heeds := range []bool{false, true} {
		single := redis.NewClient(&redis.Options{Addr: "127.0.0.1:1", ContextTimeoutEnabled: heeds})
		defer single.Close()
		cluster := redis.NewClusterClient(&redis.ClusterOptions{Addrs: []string{"127.0.0.1:1"}, ContextTimeoutEnabled: heeds})
		defer cluster.Close()
		for _, client := range []redis.UniversalClient{single, cluster} {
			var told []quota.Notice
			if _, err := goredis.New(client, &goredis.Options{Notice: func(n quota.Notice) { told = append(told, n) }}); err != nil {
				t.Fatal(err)
			}
			if heeds && len(told) > 0 || !heeds && (len(told) != 1 || told[0].Name != "deadline" || !strings.Contains(told[0].Text, "ContextTimeoutEnabled")) {
				t.Errorf("%T, ContextTimeoutEnabled %v: got notices %+v, want one of the deadline unless the client heeds it", client, heeds, told)
			}
			if _, err := goredis.New(client, nil); err != nil { // without a Notice
				t.Error(err)
			}
		}
	}
}
