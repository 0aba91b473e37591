package faulttest

import (
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"

	"github.com/fleetquota/fleetquota/internal/redisserver"
	"github.com/fleetquota/fleetquota/quota"
)

const linearCapacity = 25

// seen is what a caller learnt of a call.
type seen struct {
	unknown   bool
	allowed   bool
	remaining int64
}

// counter is a key with a limit: a call whose outcome is unknown was made or not.
var counter = (&porcupine.NondeterministicModel{
	Init: func() []any { return []any{int64(0)} },
	Step: func(state, in, out any) []any {
		used, c, o := state.(int64), in.(quota.Charge), out.(seen)
		fits, next := used+c.Cost <= linearCapacity, used
		if fits && c.Op == quota.OpTake {
			next += c.Cost
		}
		switch {
		case o.unknown && next != used:
			return []any{used, next}
		case o.unknown || o.allowed == fits && o.remaining == linearCapacity-next:
			return []any{next}
		}
		return nil
	},
	DescribeOperation: func(in, out any) string {
		return fmt.Sprintf("%v %d: %+v", in.(quota.Charge).Op, in.(quota.Charge).Cost, out)
	},
}).ToModel()

// TestLinearizable races callers for one key while replies are lost: some order of the calls, in which each
// that is unknown was made or was not, explains all answers.
func TestLinearizable(t *testing.T) {
	eachLibrary(t, func(t *testing.T, l library) {
		server := redisserver.Start(t)
		proxies := redisserver.StartProxies(t, server.Addr())
		s := l.open(t, single(server).through(proxies))
		limit := yearly(linearCapacity)
		random := rand.New(rand.NewPCG(seed(t), 0))
		calls(s, yearly(plenty), keys(1), 1)
		lost := proxies.Inject(redisserver.Fault{Action: redisserver.DropReply, Match: redisserver.Commands("EVALSHA"), Probability: 0.15, Seed: random.Uint64()})
		var unknown atomic.Int64
		for round := range sized(30, 1000) {
			const clients, each = 6, 8
			key := fmt.Sprint("linear-", round)
			history := make([][]porcupine.Operation, clients)
			start := time.Now()
			var wg sync.WaitGroup
			for client := range clients {
				r := rand.New(rand.NewPCG(random.Uint64(), 0))
				wg.Go(func() {
					for range each {
						c := quota.Charge{Limit: limit, Key: key, Cost: 1 + r.Int64N(3)}
						if r.IntN(4) == 0 {
							c.Op = quota.OpPeek
						}
						op := porcupine.Operation{ClientId: client, Input: c, Call: int64(time.Since(start))}
						d, err := s.Take(bg, c)
						op.Return = int64(time.Since(start))
						if err != nil {
							if class(err) != quota.ErrIndeterminate {
								t.Error(err)
							}
							unknown.Add(1)
							op.Return = int64(time.Hour) // it may still be on its way
						}
						op.Output = seen{err != nil, d.Allowed, d.Remaining}
						history[client] = append(history[client], op)
					}
				})
			}
			wg.Wait()
			var all []porcupine.Operation
			for _, h := range history {
				all = append(all, h...)
			}
			switch porcupine.CheckOperationsTimeout(counter, all, 10*time.Second) {
			case porcupine.Illegal:
				for _, op := range all {
					t.Logf("%d-%d %s", op.Call, op.Return, counter.DescribeOperation(op.Input, op.Output))
				}
				t.Fatal("no order of these calls explains their answers")
			case porcupine.Unknown:
				t.Log("a history took too long to check")
			}
		}
		t.Logf("%d replies lost, %d outcomes unknown", lost.Fired(), unknown.Load())
		if unknown.Load() == 0 {
			t.Error("nothing was lost")
		}
	})
}
