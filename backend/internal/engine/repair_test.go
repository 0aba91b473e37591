package engine

import (
	"errors"
	"testing"
	"testing/synctest"
	"time"
)

// A server that answers so became a replica: before Redis 7 a script's error has the code within it.
func TestIsDemoted(t *testing.T) {
	for text, want := range map[string]bool{
		"READONLY You can't write against a read only replica. script: f1, on @user_script:1.":                                  true,
		"ERR Error running script (call to f_4): @user_script:1: @user_script: 1: -READONLY You can't write against a replica.": true,
		"MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'.":                                      true,
		"LOADING Redis is loading the dataset in memory":                                                                        false,
		"NOREPLICAS Not enough good replicas to write.":                                                                         false,
		"MOVED 1 127.0.0.1:1": false,
	} {
		if got := IsDemoted(errors.New(text)); got != want {
			t.Errorf("%q: got %v, want %v", text, got, want)
		}
	}
}

// While a repair is asked for all the time, the pause from one to the next doubles. After a quiet time it is short again.
func TestRepairPauses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var at []time.Duration
		start := time.Now()
		r := &Repair{Do: func() { at = append(at, time.Since(start)) }}
		ask := func(until time.Duration) {
			for ; time.Since(start) < until; time.Sleep(10 * time.Millisecond) {
				r.Soon()
				synctest.Wait()
			}
		}
		ask(13 * time.Second)
		time.Sleep(time.Minute)
		ask(73*time.Second + 300*time.Millisecond)
		r.Close()
		r.Soon()
		r.Wait()
		want := []time.Duration{0, 250, 750, 1750, 3750, 7750, 11750, 73000, 73250}
		if len(at) != len(want) {
			t.Fatalf("repairs: got %v, want %d of them", at, len(want))
		}
		for i := range want {
			if early := at[i] - want[i]*time.Millisecond; early < 0 || early > 20*time.Millisecond {
				t.Errorf("repair %d: got %v, want it after %v", i, at[i], want[i]*time.Millisecond)
			}
		}
	})
}
