package conformance

import (
	"math/rand/v2"
	"testing"
)

// Fuzz is a fuzz target: its input chooses limits, calls and times, and every answer is compared with that of the Go
// kernels. The test of a backend has
//
//	func FuzzStore(f *testing.F) { conformance.Fuzz(f, harness) }
//
// and go test -fuzz FuzzStore searches until it is stopped. Each input gets data of its own, so Open should be quick. A
// backend that lacks Exact is skipped.
func Fuzz(f *testing.F, h Harness) {
	f.Helper()
	s, err := newSuite(h, options{seed: 1})
	if err != nil {
		f.Fatal(err)
	}
	for seed := range uint64(8) {
		rng := rand.New(rand.NewPCG(seed, 0))
		data := make([]byte, 64<<(seed%4))
		for i := range data {
			data[i] = byte(rng.Uint32())
		}
		f.Add(data)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		result := s.try(t, &testCase{rule: s1, name: "fuzz", needs: []Feature{Exact}, run: func(tr *trial) { tr.fuzz(data) }})
		switch result.Outcome {
		case Failed:
			t.Error(result.Text)
		case Skipped:
			t.Skip(result.Text)
		}
	})
}

// fuzz plays the trace that the data encode.
func (t *trial) fuzz(data []byte) {
	rng := rand.New(&source{data: data, after: rand.NewPCG(uint64(len(data)), 0)})
	sh := &shape{kinds: random, limits: 2, keys: 3, list: 4, steps: min(1+len(data)/16, 64), ops: anyOps, cost: randomCost, change: rng.IntN(4) == 0, expiry: rng.IntN(4) == 0, floors: rng.IntN(2) == 0, shadow: rng.IntN(2) == 0}
	sh.ids = !t.lacks(IDs) && rng.IntN(3) == 0
	injected := !t.lacks(Clock)
	p := t.player(t.root, injected)
	if trace, wrong := t.improvise(p, rng, sh); wrong != "" {
		t.refute(trace, wrong, injected)
	}
}

// source is a rand.Source that uses two bytes of data for each choice, so that a change of the data changes a choice,
// and random numbers when the data are used up.
type source struct {
	data  []byte
	after rand.Source
}

func (s *source) Uint64() uint64 {
	if len(s.data) < 2 {
		return s.after.Uint64()
	}
	// Small numbers are chosen by the highest bits.
	n := uint64(s.data[0])<<8 | uint64(s.data[1])
	s.data = s.data[2:]
	return n<<48 | n<<32 | n<<16 | n
}
