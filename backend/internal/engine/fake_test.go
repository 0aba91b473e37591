package engine

import (
	"context"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/internal/testenv"
	"github.com/fleetquota/fleetquota/quota"
)

var bg = context.Background()

// fake is a Client that answers as a test wants.
type fake func(args []any, keys int) (Reply, error)

func (f fake) Do(_ context.Context, args []any, keys int) (Reply, error) { return f(args, keys) }
func (fake) Info(context.Context) ([]string, error)                      { return nil, nil }
func (fake) Close() error                                                { return nil }

// elements is a Reply of int64, string, nil, and elements that no script returns.
type elements []any

func (e elements) Len() int { return len(e) }

func (e elements) Int(i int) (int64, bool) {
	if i >= len(e) {
		return 0, false
	}
	n, ok := e[i].(int64)
	return n, ok
}

func (e elements) Text(i int) (string, bool) {
	if i >= len(e) {
		return "", false
	}
	if e[i] == nil {
		return "", true
	}
	s, ok := e[i].(string)
	return s, ok
}

// singleReply is the reply to a charge that goes alone: the time, negative if no state changed, and the state as it was.
func singleReply(now int64, state string) Bulk { return Bulk(appendNumber(nil, now)) + Bulk(state) }

// freshReply is the reply to a script that found no state: of a charge that goes alone, of a batch whose charges all are granted and
// change their states, or of one that loads states.
func freshReply(args []any, keys int) Reply {
	const now = int64(1_795_427_141_791_724)
	r := elements{now}
	switch args := args[3+keys:]; {
	case len(args) >= 6:
		r = append(r, changes(args))
	case len(args) > 0:
		return singleReply(now, "")
	}
	for range keys {
		r = append(r, nil)
	}
	return r
}

func newStore(t testing.TB, cluster bool, f fake) *Store {
	t.Helper()
	o := Options{}
	if !cluster { // the calls are the test's alone
		o.Batching = BatchAll
	}
	s, err := New(f, cluster, o)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// probeReply is the right answer to the question for the server's functions, or nil if the command is another.
func probeReply(args []any) elements {
	var words []string
	for _, a := range args {
		words = append(words, a.(string))
	}
	reply, _ := Probe(words)
	return reply
}

// sender is a Client over a go-redis client. It adds the scripts that ran to calls.
func sender(client *redis.Client, calls *int) fake {
	return func(args []any, keys int) (Reply, error) {
		cmd := redis.NewCmd(bg, args...)
		if err := client.Process(bg, cmd); err != nil {
			return nil, err
		}
		*calls++
		switch r := cmd.Val().(type) {
		case []any:
			return elements(r), nil
		case string:
			return Bulk(r), nil
		}
		return elements{}, nil
	}
}

func limitOf(name string, a quota.Algorithm) *quota.Limit { return quota.NewLimit(name, a) }

func window(limit int64) quota.Algorithm {
	return algorithm.FixedWindow(limit, 365*24*time.Hour)
}

// hidden is an algorithm whose Lua the store does not see.
type hidden struct{ quota.Algorithm }

// random returns a generator whose seed a failing test prints.
var random = testenv.Random
