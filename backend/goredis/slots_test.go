package goredis

import (
	"slices"
	"testing"

	"github.com/redis/go-redis/v9"
)

// The nodes' addresses in an answer to CLUSTER SLOTS, as they are dialled.
func TestReadSlots(t *testing.T) {
	node := func(host any, port int64) any { return []any{host, port, "id"} }
	slots := func(nodes ...any) []any { return []any{append([]any{int64(0), int64(9)}, nodes...)} }
	for _, test := range []struct {
		name, from string
		answer     []any
		want       []string // nil is an error
	}{
		{"as told", "10.0.0.1:7000", slots(node("10.0.0.2", 7001), node("10.0.0.3", 7002)), []string{"10.0.0.2:7001", "10.0.0.3:7002"}},
		{"a name", "10.0.0.1:7000", slots(node("redis-2.example", 7001)), []string{"redis-2.example:7001"}},
		{"no host", "10.0.0.1:7000", slots(node("", 7001)), []string{"10.0.0.1:7001"}},
		{"null", "redis.example:7000", slots(node(nil, 7001)), []string{"redis.example:7001"}},
		{"a replica that is not known", "10.0.0.1:7000", slots(node("10.0.0.2", 7001), node("?", 7002)), []string{"10.0.0.2:7001"}},
		{"a master that is not known", "10.0.0.1:7000", slots(node("?", 7001), node("10.0.0.2", 7002)), nil},
		{"port of TLS alone", "10.0.0.1:7000", slots(node("10.0.0.2", 0)), []string{"10.0.0.2:7000"}},
		{"loopback", "localhost:7000", slots(node("127.0.0.1", 7001), node("::1", 7002)), []string{"127.0.0.1:7001", "[::1]:7002"}},
		{"loopback of another machine", "10.0.0.1:7000", slots(node("127.0.0.1", 7001)), []string{"10.0.0.1:7001"}},
		{"nothing", "10.0.0.1:7000", nil, nil},
		{"no node", "10.0.0.1:7000", slots(), nil},
		{"no array", "10.0.0.1:7000", []any{"OK"}, nil},
		{"a slot too many", "10.0.0.1:7000", []any{[]any{int64(0), int64(16384), node("10.0.0.2", 7001)}}, nil},
		{"a port in words", "10.0.0.1:7000", slots([]any{"10.0.0.2", "7001"}), nil},
		{"a host that is a number", "10.0.0.1:7000", slots([]any{int64(1), int64(7001)}), nil},
	} {
		got, err := readSlots(test.answer, test.from)
		if (err != nil) != (test.want == nil) {
			t.Errorf("%s: got %v, error %v; want %v", test.name, got, err, test.want)
			continue
		}
		var addrs []string
		for _, s := range got {
			for _, n := range s.Nodes {
				client := newNode(&redis.Options{Addr: n.Addr, NodeAddress: n.Addr})
				addrs = append(addrs, client.Options().Addr)
				client.Close()
			}
		}
		if !slices.Equal(addrs, test.want) {
			t.Errorf("%s: got %v, want %v", test.name, addrs, test.want)
		}
	}
}
