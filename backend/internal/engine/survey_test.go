package engine

import (
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/fleetquota/fleetquota/quota"
)

// The first good answer counts. A node that hangs delays none, and is asked no other question meanwhile.
func TestSurvey(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var s Survey[string]
		hangs := make(chan struct{})
		asked := map[string]int{}
		refused := errors.New("refused")
		ask := func(node string) (string, error) {
			switch node {
			case "hangs":
				asked[node]++ // by one goroutine at a time
				<-hangs
			case "refuses":
				return "", refused
			case "slow":
				time.Sleep(time.Second)
			}
			return node, nil
		}
		for range 3 {
			synctest.Wait()
			began := time.Now()
			if got, err := s.Ask([]string{"hangs", "refuses", "well"}, ask); got != "well" || err != nil || time.Since(began) > 0 {
				t.Errorf("got %q, error %v after %v; want the answer of the node that is well, at once", got, err, time.Since(began))
			}
		}
		synctest.Wait()
		if asked["hangs"] != 1 {
			t.Errorf("questions to a node that hangs: got %d, want 1", asked["hangs"])
		}
		if got, err := s.Ask([]string{"slow", "refuses"}, ask); got != "slow" || err != nil {
			t.Errorf("got %q, error %v; want the answer of the slow node", got, err)
		}
		if _, err := s.Ask([]string{"refuses"}, ask); err != refused {
			t.Errorf("all refuse: got error %v, want %v", err, refused)
		}
		if _, err := s.Ask([]string{"hangs"}, ask); !errors.Is(err, quota.ErrUnavailable) {
			t.Errorf("an earlier question is without an answer: got error %v, want ErrUnavailable", err)
		}
		close(hangs)
		synctest.Wait()
		hangs = make(chan struct{})
		began := time.Now()
		if _, err := s.Ask([]string{"hangs"}, ask); !errors.Is(err, quota.ErrUnavailable) || time.Since(began) != surveyTimeout {
			t.Errorf("no answer: got error %v after %v, want ErrUnavailable after %v", err, time.Since(began), surveyTimeout)
		}
		close(hangs)
	})
}
