package engine

import (
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"

	"github.com/fleetquota/fleetquota/quota"
)

// A list over three slots of which a part fails: the error never says 'not charged' if a part was charged,
// and every part that can be given back is, once.
func TestSplitErrors(t *testing.T) {
	down := fmt.Errorf("%w: down", quota.ErrUnavailable)
	lost := fmt.Errorf("%w: lost", quota.ErrIndeterminate)
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
		{"give-back lost", [3]quota.Op{take, take, take}, map[string]error{"b:take": down, "c:refund": lost}, quota.ErrIndeterminate, "a:refund a:take b:take c:refund c:take"},
		{"give-back down", [3]quota.Op{take, take, take}, map[string]error{"b:take": down, "c:refund": down}, quota.ErrIndeterminate, "a:refund a:take b:take c:refund c:take"},
		{"peek down", [3]quota.Op{quota.OpPeek, quota.OpPeek, quota.OpPeek}, map[string]error{"b:peek": down}, quota.ErrUnavailable, "a:peek b:peek c:peek"},
		{"debit after grant down", [3]quota.Op{take, quota.OpDebit, take}, map[string]error{"b:debit": down}, quota.ErrIndeterminate, "a:take b:debit c:take"},
		{"no debit without grant", [3]quota.Op{take, quota.OpDebit, take}, map[string]error{"a:take": down}, quota.ErrUnavailable, "a:take c:refund c:take"},
		{"some debits down", [3]quota.Op{quota.OpDebit, quota.OpDebit, quota.OpReset}, map[string]error{"b:debit": down}, quota.ErrIndeterminate, "a:debit b:debit c:reset"},
		{"all debits down", [3]quota.Op{quota.OpDebit, quota.OpDebit, quota.OpReset}, map[string]error{"a:debit": down, "b:debit": down, "c:reset": down}, quota.ErrUnavailable, "a:debit b:debit c:reset"},
	} {
		t.Run(test.name, func(t *testing.T) {
			var mu sync.Mutex
			var calls []string
			s := newStore(t, true, func(args []any, keys int) (Reply, error) {
				key := args[3].(string)
				call := strings.TrimSuffix(strings.TrimPrefix(key, "quota:{"), "}:n") + ":" + [...]string{"take", "peek", "debit", "refund", "reset"}[strings.Fields(args[3+keys+6].(string))[1][0]-'0']
				mu.Lock()
				defer mu.Unlock()
				calls = append(calls, call)
				if err := test.fail[call]; err != nil {
					return nil, err
				}
				return elements{int64(1_795_427_141_791_724), int64(1), nil}, nil
			})
			cs := make([]quota.Charge, 3)
			for i := range cs {
				cs[i] = quota.Charge{Limit: limitOf("n", window(10)), Key: string(rune('a' + i)), Cost: 1, Op: test.ops[i]}
			}
			err := s.TakeAll(bg, cs, make([]quota.Decision, 3))
			if !errors.Is(err, test.want) || errors.Is(err, quota.ErrIndeterminate) && errors.Is(err, quota.ErrUnavailable) {
				t.Errorf("got error %v, want only %v", err, test.want)
			}
			sorted := strings.Fields(test.calls)
			for _, call := range calls {
				found := false
				for i := range sorted {
					if sorted[i] == call {
						sorted[i], found = "", true
						break
					}
				}
				if !found {
					t.Errorf("got call %s, want only %s", call, test.calls)
				}
			}
			if left := strings.Join(sorted, ""); left != "" {
				t.Errorf("got calls %v, want %s: missing %s", calls, test.calls, left)
			}
		})
	}
}
