package engine

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// A list over three slots of which a part fails: the error never says 'not charged' if a part may be charged,
// and every part that can be given back is. A give-back is repeated under its request id until it is made, and
// told where it never is.
func TestSplitErrors(t *testing.T) {
	down := fmt.Errorf("%w: down", quota.ErrUnavailable)
	lost := fmt.Errorf("%w: lost", quota.ErrIndeterminate)
	const now = int64(1_795_427_141_791_724)
	var full driver.Item
	if err := driver.ApplyOne(&quota.Charge{Limit: limitOf("n", window(10)), Key: "b", Cost: 10}, &full, quota.Micros(now), new(quota.Decision)); err != nil {
		t.Fatal(err)
	}
	misconfigured := fmt.Errorf("%w: a right", quota.ErrMisconfigured)
	take := quota.OpTake
	for _, test := range []struct {
		name  string
		ops   [3]quota.Op
		fail  map[string]error // by operation and key
		want  error
		calls string // in order of keys and operations
	}{
		{"all well", [3]quota.Op{take, take, take}, nil, nil, "a:take b:take c:take"},
		{"one down", [3]quota.Op{take, take, take}, map[string]error{"b:take": down}, quota.ErrUnavailable, "a:refund a:take b:take c:refund c:take"},
		{"one lost", [3]quota.Op{take, take, take}, map[string]error{"b:take": lost, "a:take": down}, quota.ErrIndeterminate, "a:take b:take c:refund c:take"},
		{"give-back lost", [3]quota.Op{take, take, take}, map[string]error{"b:take": down, "c:refund": lost}, quota.ErrIndeterminate, "a:refund a:take b:take c:refund* c:take"},
		{"give-back down", [3]quota.Op{take, take, take}, map[string]error{"b:take": down, "c:refund": down}, quota.ErrIndeterminate, "a:refund a:take b:take c:refund* c:take"},
		{"give-back lost once", [3]quota.Op{take, take, take}, map[string]error{"b:take": down, "c:refund:1": lost}, quota.ErrUnavailable, "a:refund a:take b:take c:refund c:refund c:take"},
		{"give-back down twice", [3]quota.Op{take, take, take}, map[string]error{"b:take": down, "c:refund:1": down, "c:refund:2": down}, quota.ErrUnavailable, "a:refund a:take b:take c:refund c:refund c:refund c:take"},
		{"denied", [3]quota.Op{take, take, take}, map[string]error{"b:take": nil}, nil, "a:refund a:take b:take c:refund c:take"},
		{"denied, give-back lost once", [3]quota.Op{take, take, take}, map[string]error{"b:take": nil, "a:refund:1": lost}, nil, "a:refund a:refund a:take b:take c:refund c:take"},
		{"denied, give-back lost", [3]quota.Op{take, take, take}, map[string]error{"b:take": nil, "a:refund": lost}, quota.ErrIndeterminate, "a:refund* a:take b:take c:refund c:take"},
		{"denied, give-back down", [3]quota.Op{take, take, take}, map[string]error{"b:take": nil, "a:refund": down}, quota.ErrIndeterminate, "a:refund* a:take b:take c:refund c:take"},
		{"denied, give-back refused", [3]quota.Op{take, take, take}, map[string]error{"b:take": nil, "a:refund": misconfigured}, quota.ErrIndeterminate, "a:refund a:take b:take c:refund c:take"},
		{"peek down", [3]quota.Op{quota.OpPeek, quota.OpPeek, quota.OpPeek}, map[string]error{"b:peek": down}, quota.ErrUnavailable, "a:peek b:peek c:peek"},
		{"debit after grant down", [3]quota.Op{take, quota.OpDebit, take}, map[string]error{"b:debit": down}, quota.ErrIndeterminate, "a:take b:debit c:take"},
		{"no debit without grant", [3]quota.Op{take, quota.OpDebit, take}, map[string]error{"a:take": down}, quota.ErrUnavailable, "a:take c:refund c:take"},
		{"some debits down", [3]quota.Op{quota.OpDebit, quota.OpDebit, quota.OpReset}, map[string]error{"b:debit": down}, quota.ErrIndeterminate, "a:debit b:debit c:reset"},
		{"all debits down", [3]quota.Op{quota.OpDebit, quota.OpDebit, quota.OpReset}, map[string]error{"a:debit": down, "b:debit": down, "c:reset": down}, quota.ErrUnavailable, "a:debit b:debit c:reset"},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var mu sync.Mutex
				var calls []string
				count, ids := map[string]int{}, map[string]string{}
				s := newStore(t, true, func(args []any, keys int) (Reply, error) {
					key := args[3].(string)
					op := "take"
					if keys == 2 { // a list with an id
						op = "refund"
					} else if len(args) > 7 {
						op = map[string]string{"1": "peek", "2": "debit", "4": "reset"}[args[7].(string)]
					}
					call := strings.TrimSuffix(strings.TrimPrefix(key, "quota:{"), "}:n") + ":" + op
					mu.Lock()
					defer mu.Unlock()
					calls = append(calls, call)
					count[call]++
					if op == "refund" {
						id := args[4].(string)
						if before := ids[key]; before != "" && before != id {
							t.Errorf("%s: got id key %q; want the id key %q of the first attempt", call, id, before)
						}
						ids[key] = id
					}
					err, listed := test.fail[call]
					if err == nil {
						err = test.fail[fmt.Sprintf("%s:%d", call, count[call])]
					}
					if err != nil {
						return nil, err
					}
					switch {
					case listed: // full: ten are used
						return singleReply(-now, pack(&full)), nil
					case op == "refund":
						return freshReply(args, keys), nil
					case op == "peek" || op == "reset": // nothing changed
						return singleReply(-now, ""), nil
					}
					return singleReply(now, ""), nil
				})
				cs := make([]quota.Charge, 3)
				for i := range cs {
					cs[i] = quota.Charge{Limit: limitOf("n", window(10)), Key: string(rune('a' + i)), Cost: 1, Op: test.ops[i]}
				}
				err := s.ChargeAll(bg, cs, make([]quota.Decision, 3))
				if !errors.Is(err, test.want) || errors.Is(err, quota.ErrIndeterminate) && errors.Is(err, quota.ErrUnavailable) {
					t.Errorf("got error %v, want only %v", err, test.want)
				}
				for i := range calls { // a star stands for repeats until the time is up
					if many := calls[i] + "*"; strings.Contains(test.calls, many) {
						if n := count[calls[i]]; n < 5 || n > 100 {
							t.Errorf("attempts of %s: got %d, want 5 to 100", calls[i], n)
						}
						calls[i] = many
					}
				}
				slices.Sort(calls)
				got := strings.Join(calls, " ")
				if strings.Contains(test.calls, "*") {
					got = strings.Join(slices.Compact(calls), " ")
				}
				if got != test.calls {
					t.Errorf("got calls %s, want %s", got, test.calls)
				}
			})
		})
	}
}

// A give-back never holds a caller beyond its context. It goes on behind the caller's back, and Close waits for
// it.
func TestGiveBackDeadline(t *testing.T) {
	for name, end := range map[string]func(context.Context) (context.Context, context.CancelFunc){
		"deadline": func(ctx context.Context) (context.Context, context.CancelFunc) {
			return context.WithTimeout(ctx, 50*time.Millisecond)
		},
		"cancellation": func(ctx context.Context) (context.Context, context.CancelFunc) {
			ctx, cancel := context.WithCancel(ctx)
			time.AfterFunc(50*time.Millisecond, cancel)
			return ctx, cancel
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var made atomic.Bool
				s := newStore(t, true, func(args []any, keys int) (Reply, error) {
					switch {
					case strings.HasPrefix(args[3].(string), "quota:{b}"):
						return nil, ReplyError(errors.New("LOADING wait"))
					case keys == 2: // the give-back
						time.Sleep(300 * time.Millisecond)
						made.Store(true)
					}
					return freshReply(args, keys), nil
				})
				l := limitOf("n", window(10))
				ctx, cancel := end(t.Context())
				defer cancel()
				start := time.Now()
				err := s.ChargeAll(ctx, []quota.Charge{{Limit: l, Key: "a", Cost: 1}, {Limit: l, Key: "b", Cost: 1}}, make([]quota.Decision, 2))
				if took := time.Since(start); took != 50*time.Millisecond || !errors.Is(err, quota.ErrIndeterminate) || errors.Is(err, quota.ErrUnavailable) {
					t.Errorf("got error %v after %v, want ErrIndeterminate after 50ms", err, took)
				}
				s.Close()
				if took := time.Since(start); !made.Load() || took != 300*time.Millisecond {
					t.Errorf("Close: got the give-back made=%v after %v, want true after 300ms", made.Load(), took)
				}
			})
		})
	}
}
